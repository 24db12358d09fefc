-- Takes all that a task needs, or nothing.
-- KEYS: wallet, holds, drafts, the task's mark, the answer of its Idempotency-Key (or the mark again).
-- ARGV: task, owner, least, most, requests limit, slots limit, tokens, tokens limit (limits: '' is none),
--       model, draft, window in microseconds, '=' and Idempotency-Key or '', fingerprint, call, enough, shares
local task, owner, least, most = ARGV[1], ARGV[2], whole(ARGV[3]), whole(ARGV[4])
local requests_limit, slots_limit = tonumber(ARGV[5]), tonumber(ARGV[6])
local tokens, tokens_limit, model, draft = whole(ARGV[7]), tonumber(ARGV[8]), ARGV[9], ARGV[10]
local span, key, fingerprint, call = whole(ARGV[11]), ARGV[12], ARGV[13], ARGV[14]
local enough, shares = whole(ARGV[15]), whole(ARGV[16])

local now = clock()
local wallet = read_wallet(model, span, now)
local hold = read_hold(task)
local mark = redis.call('GET', KEYS[4])
if hold then return {'taken', standing(wallet), hold.held} end

if key ~= '' then
  local kept = redis.call('HMGET', KEYS[5], 'fingerprint', 'task', 'record', 'cost', 'uncollected', 'answer')
  if kept[1] and (kept[6] or redis.call('HEXISTS', KEYS[2], kept[2]) == 1) then
    if kept[1] ~= fingerprint then return {'refused', standing(wallet), 'idempotency_mismatch'} end
    if not kept[6] then return {'refused', standing(wallet), 'idempotency_conflict'} end
    return {'repeated', standing(wallet), kept[3], kept[4], kept[5], kept[6]}
  end
end
-- It ended: it was charged, or this very take was voided before it came here.
if mark and (string.match(mark, '^(%S+)') ~= 'void' or string.sub(mark, 6) == call) then return {'gone'} end

if requests_limit and wallet.requests >= requests_limit then
  return {'refused', standing(wallet), 'rate_limit_exceeded'}
end
if slots_limit and wallet.slots >= slots_limit then
  return {'refused', standing(wallet), 'concurrency_limit_exceeded'}
end
if tokens_limit and wallet.tokens + tokens > tokens_limit then
  return {'refused', standing(wallet), 'token_limit_exceeded'}
end
if wallet.available < least then return {'refused', standing(wallet), 'insufficient_credits'} end
local held = math.min(most, wallet.available)
if enough > 0 then
  local free = slots_limit and slots_limit - wallet.slots or shares
  held = math.min(held, math.max(math.floor(wallet.available / free), enough, least))
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
hold = {owner = owner, call = call, held = held, cost = 0, requests_window = wallet.requests_window,
  tokens = tokens, tokens_window = wallet.tokens_window, model = model, key = key}

redis.call('HSET', KEYS[2], task, write_hold(hold))
redis.call('HSET', KEYS[3], task, draft)
if #changed > 0 then redis.call('HSET', KEYS[1], unpack(changed)) end
redis.call('HINCRBY', KEYS[1], 'requests', 1)
if counted then redis.call('HINCRBY', KEYS[1], 'tokens:' .. model, digits(tokens)) end
redis.call('HINCRBY', KEYS[1], 'held', digits(held))
if mark then redis.call('DEL', KEYS[4]) end
if key ~= '' then
  redis.call('DEL', KEYS[5])
  redis.call('HSET', KEYS[5], 'fingerprint', fingerprint, 'task', task)
end
wallet.requests, wallet.slots = wallet.requests + 1, wallet.slots + 1
wallet.tokens = wallet.tokens + tokens
wallet.available = wallet.available - held
return {'taken', standing(wallet), held}
