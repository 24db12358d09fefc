-- Charges a task, writes its record and releases its reservation. A repeated call returns the first result.
-- KEYS: wallet, reservations, drafts, the task's tombstone, usage, the answer of its Idempotency-Key (or the
--       tombstone again).
-- ARGV: task, cost, tokens, model, record, digest of the record, '1' with an answer, the answer,
--       '=' and Idempotency-Key or '', window in microseconds, TTLs of tombstone and answer in seconds
local task, cost, tokens, model = ARGV[1], whole(ARGV[2]), whole(ARGV[3]), ARGV[4]
local record, digest = ARGV[5], ARGV[6]
local key, span, tombstone_ttl, answer_ttl = ARGV[9], whole(ARGV[10]), whole(ARGV[11]), whole(ARGV[12])

local reservation = read_reservation(task)
local wallet = read_wallet(reservation and reservation.model or model, span, clock())
local tombstone = redis.call('GET', KEYS[4])
if tombstone then
  local charged, uncollected, first = string.match(tombstone, '^settled (%d+) (%d+) (%S+)$')
  if charged then return {'settled', limit_status(wallet), charged, uncollected, first} end
  return {'ended'}
end
if not reservation then return {'ended'} end
if reservation.key ~= key then return {'key', reservation.key} end
redis.call('XLEN', KEYS[5])
local owns_key = has_key(KEYS[6], task, key)
local charged, uncollected = charge(wallet, reservation, cost)

release(task, reservation)
if charged > 0 then redis.call('HINCRBY', KEYS[1], 'spent', digits(charged)) end
replace_tokens(wallet, reservation, tokens)
redis.call('XADD', KEYS[5], '*', 'record', record, 'cost', digits(charged),
  'uncollected', digits(uncollected))
redis.call('SET', KEYS[4], string.format('settled %s %s %s', digits(charged), digits(uncollected), digest),
  'EX', tombstone_ttl)
if owns_key and ARGV[7] == '1' then
  redis.call('HSET', KEYS[6], 'record', record, 'cost', digits(charged), 'uncollected', digits(uncollected),
    'answer', ARGV[8])
  redis.call('EXPIRE', KEYS[6], answer_ttl)
elseif owns_key then
  redis.call('DEL', KEYS[6])
end
wallet.running, wallet.available = wallet.running - 1, wallet.available + reservation.amount - charged
return {'settled', limit_status(wallet), digits(charged), digits(uncollected), digest}
