-- Reserves all that a task needs, or nothing.
-- KEYS: wallet, reservations, drafts, the task's tombstone, the answer of its Idempotency-Key (or the tombstone
--       again).
-- ARGV: task, worker, minimum, maximum, requests limit, concurrency limit, tokens, tokens limit ('': no limit),
--       model, draft, window in microseconds, '=' and Idempotency-Key or '', fingerprint, call, sufficient,
--       shares
local task, worker, minimum, maximum = ARGV[1], ARGV[2], whole(ARGV[3]), whole(ARGV[4])
local requests_limit, concurrency_limit = tonumber(ARGV[5]), tonumber(ARGV[6])
local tokens, tokens_limit, model, draft = whole(ARGV[7]), tonumber(ARGV[8]), ARGV[9], ARGV[10]
local span, key, fingerprint, call = whole(ARGV[11]), ARGV[12], ARGV[13], ARGV[14]
local sufficient, shares = whole(ARGV[15]), whole(ARGV[16])

local now = clock()
local wallet = read_wallet(model, span, now)
local reservation = read_reservation(task)
local tombstone = redis.call('GET', KEYS[4])
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

if requests_limit and wallet.requests >= requests_limit then
  return {'refused', limit_status(wallet), 'rate_limit_exceeded'}
end
if concurrency_limit and wallet.running >= concurrency_limit then
  return {'refused', limit_status(wallet), 'concurrency_limit_exceeded'}
end
if tokens_limit and wallet.tokens + tokens > tokens_limit then
  return {'refused', limit_status(wallet), 'token_limit_exceeded'}
end
if wallet.available < minimum then return {'refused', limit_status(wallet), 'insufficient_credits'} end
local amount = math.min(maximum, wallet.available)
if sufficient > 0 then
  local tasks = concurrency_limit and concurrency_limit - wallet.running or shares
  amount = math.min(amount, math.max(math.floor(wallet.available / tasks), sufficient, minimum))
end

local changed = {}
if wallet.requests_left == 0 then
  wallet.requests_window, wallet.requests_left = wallet.requests_window + 1, span
  changed = {'requests', '0', 'requests_at', digits(now), 'requests_window', digits(wallet.requests_window)}
elseif wallet.requests_left == span then
  changed = {'requests_at', digits(now)}
end
local counted = tokens > 0 or tokens_limit
if not counted then
  wallet.tokens_window = 0
elseif wallet.tokens_left == 0 then
  wallet.tokens_window, wallet.tokens_left = wallet.tokens_window + 1, span
  for _, text in ipairs({'tokens:' .. model, '0', 'tokens_at:' .. model, digits(now),
    'tokens_window:' .. model, digits(wallet.tokens_window)}) do changed[#changed + 1] = text end
elseif wallet.tokens_left == span then
  changed[#changed + 1] = 'tokens_at:' .. model
  changed[#changed + 1] = digits(now)
end
reservation = {worker = worker, call = call, amount = amount, cost = 0, requests_window = wallet.requests_window,
  tokens = tokens, tokens_window = wallet.tokens_window, model = model, key = key}

redis.call('HSET', KEYS[2], task, format_reservation(reservation))
redis.call('HSET', KEYS[3], task, draft)
if #changed > 0 then redis.call('HSET', KEYS[1], unpack(changed)) end
redis.call('HINCRBY', KEYS[1], 'requests', 1)
if counted then redis.call('HINCRBY', KEYS[1], 'tokens:' .. model, digits(tokens)) end
redis.call('HINCRBY', KEYS[1], 'held', digits(amount))
if tombstone then redis.call('DEL', KEYS[4]) end
if key ~= '' then
  redis.call('DEL', KEYS[5])
  redis.call('HSET', KEYS[5], 'fingerprint', fingerprint, 'task', task)
end
wallet.requests, wallet.running = wallet.requests + 1, wallet.running + 1
wallet.tokens = wallet.tokens + tokens
wallet.available = wallet.available - amount
return {'reserved', limit_status(wallet), amount}
