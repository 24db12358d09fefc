-- Charges a task, keeps its record and frees what it held. A repeated one gives what the first one gave.
-- KEYS: wallet, holds, drafts, the task's mark, usage, the answer of its Idempotency-Key (or the mark again).
-- ARGV: task, cost, tokens, model, record, digest of the record, '1' with an answer, the answer,
--       '=' and Idempotency-Key or '', window in microseconds, seconds of the mark, seconds of the answer
local task, cost, tokens, model = ARGV[1], whole(ARGV[2]), whole(ARGV[3]), ARGV[4]
local record, digest = ARGV[5], ARGV[6]
local key, span, remembered, kept = ARGV[9], whole(ARGV[10]), whole(ARGV[11]), whole(ARGV[12])

local hold = read_hold(task)
local wallet = read_wallet(hold and hold.model or model, span, clock())
local mark = redis.call('GET', KEYS[4])
if mark then
  local charged, uncollected, first = string.match(mark, '^settled (%d+) (%d+) (%S+)$')
  if charged then return {'settled', standing(wallet), charged, uncollected, first} end
  return {'gone'}
end
if not hold then return {'gone'} end
if hold.key ~= key then return {'key', hold.key} end
redis.call('XLEN', KEYS[5])
local waiting = answers(KEYS[6], task, key)
local charged, uncollected = charge(wallet, hold, cost)

free(task, hold)
if charged > 0 then redis.call('HINCRBY', KEYS[1], 'spent', digits(charged)) end
replace_tokens(wallet, hold, tokens)
redis.call('XADD', KEYS[5], '*', 'record', record, 'cost', digits(charged),
  'uncollected', digits(uncollected))
redis.call('SET', KEYS[4], string.format('settled %s %s %s', digits(charged), digits(uncollected), digest),
  'EX', remembered)
if waiting and ARGV[7] == '1' then
  redis.call('HSET', KEYS[6], 'record', record, 'cost', digits(charged), 'uncollected', digits(uncollected),
    'answer', ARGV[8])
  redis.call('EXPIRE', KEYS[6], kept)
elseif waiting then
  redis.call('DEL', KEYS[6])
end
wallet.slots, wallet.available = wallet.slots - 1, wallet.available + hold.held - charged
return {'settled', standing(wallet), digits(charged), digits(uncollected), digest}
