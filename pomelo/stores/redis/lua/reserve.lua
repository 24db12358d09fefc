-- Reserves all that a task needs, or nothing.
-- KEYS: wallet, reservations, drafts, the task's tombstone, the answer of its Idempotency-Key (or the tombstone
--       again).
-- ARGV: task, worker, minimum, maximum, draft, '=' and Idempotency-Key or '', fingerprint, call, sufficient, the
--       counter of the shares or '', shares without its limit, the name of a budget or '', its limit, its start in
--       microseconds, counters

-- An amount that a task needs: it may be more than any balance.
local function needed(text) return math.min(tonumber(text), MAX_INTEGER) end

local task, worker, minimum, maximum, draft = ARGV[1], ARGV[2], needed(ARGV[3]), needed(ARGV[4]), ARGV[5]
local key, fingerprint, call, sufficient = ARGV[6], ARGV[7], ARGV[8], needed(ARGV[9])
local shares, counters = whole(ARGV[11]), read_counters(15)

local now = clock()
local wallet = read_wallet(now, counters, {})
local reservation = read_reservation(task)
local tombstone = redis.call('GET', KEYS[4])
local budget = read_budget(ARGV[12], whole(ARGV[14]))
if reservation then return {'reserved', limit_status(wallet), reservation.amount} end

if key ~= '' then
  local stored = redis.call('HMGET', KEYS[5], 'fingerprint', 'task', 'record', 'cost', 'uncollected', 'answer')
  if stored[1] and (stored[6] or redis.call('HEXISTS', KEYS[2], stored[2]) == 1) then
    if stored[1] ~= fingerprint then return {'refused', limit_status(wallet), 'idempotency_mismatch'} end
    if not stored[6] then return {'refused', limit_status(wallet), 'idempotency_conflict'} end
    return {'replayed', limit_status(wallet), stored[3], stored[4], stored[5], stored[6]}
  end
end
-- The task has ended: it was charged, or this very call was voided before it arrived.
if tombstone and (string.match(tombstone, '^(%S+)') ~= 'void' or string.sub(tombstone, 6) == call) then
  return {'ended'}
end

for at = 1, #counters do
  local counter = counters[at]
  local used, limit = counter.used, counter.limit
  if limit and counter.amount > 0 and used + counter.amount > limit then
    -- A window with a start in the future starts now, also if nothing can be counted: it must end in one span.
    if counter.span > 0 and counter.left == counter.span then
      redis.call('HSET', KEYS[1], window_fields(counter.name), digits(now))
    end
    return {'refused', limit_status(wallet), 'limit_exceeded', counter.name}
  end
  if limit and counter.name == ARGV[10] then shares = math.max(1, limit - used) end
end
if wallet.available < minimum then return {'refused', limit_status(wallet), 'insufficient_credits'} end
local available = wallet.available
if budget then
  available = math.min(available, whole(ARGV[13]) - budget.used)
  if available < minimum then
    return {'refused', limit_status(wallet), 'insufficient_credits', budget.name}
  end
end
local amount = math.min(maximum, available)
if sufficient > 0 then
  amount = math.min(amount, math.max(math.floor(available / shares), sufficient, minimum))
end

local changed = {'held', digits(wallet.held + amount)}
for at = 1, #counters do
  local counter = counters[at]
  -- A new window starts now. So does one with a start in the future.
  if counter.span > 0 and (counter.left == 0 or counter.left == counter.span) then
    local start, number = window_fields(counter.name)
    if counter.left == 0 then counter.number = counter.number + 1 end
    counter.left = counter.span
    changed[#changed + 1], changed[#changed + 2] = start, digits(now)
    changed[#changed + 1], changed[#changed + 2] = number, digits(counter.number)
  end
  counter.used = counter.used + counter.amount
  changed[#changed + 1], changed[#changed + 2] = counter.name, digits(counter.used)
end
if budget then
  changed[#changed + 1], changed[#changed + 2] = budget.name, digits(budget.used + amount)
  changed[#changed + 1], changed[#changed + 2] = window_fields(budget.name), digits(budget.start)
end
reservation = {worker = worker, call = call, amount = amount, cost = 0, rest = format_counted(key, counters, budget)}

redis.call('HSET', KEYS[2], task, format_reservation(reservation))
redis.call('HSET', KEYS[3], task, draft)
redis.call('HSET', KEYS[1], unpack(changed))
if tombstone then redis.call('DEL', KEYS[4]) end
if key ~= '' then
  redis.call('DEL', KEYS[5])
  redis.call('HSET', KEYS[5], 'fingerprint', fingerprint, 'task', task)
end
wallet.available = wallet.available - amount
return {'reserved', limit_status(wallet), amount}
