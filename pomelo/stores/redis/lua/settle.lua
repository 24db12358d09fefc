-- Charges a task, writes its record and releases its reservation. A repeated call returns the first result.
-- KEYS: wallet, reservations, drafts, the task's tombstone, the answer of its Idempotency-Key (or the tombstone
--       again), usage.
-- ARGV: task, cost, record, digest of the record, '1' with an answer, the answer, '=' and Idempotency-Key or '',
--       TTLs of tombstone and answer in seconds, counters
local task, cost, record, digest = ARGV[1], whole(ARGV[2]), ARGV[3], ARGV[4]
local key, tombstone_ttl, answer_ttl, counters = ARGV[7], whole(ARGV[8]), whole(ARGV[9]), read_counters(10)

local reservation = read_reservation(task)
local wallet = read_wallet(clock(), counters, reservation and reservation.counters or {})
local tombstone = redis.call('GET', KEYS[4])
if tombstone then
  local charged, uncollected, first = string.match(tombstone, '^settled (%d+) (%d+) (%S+)$')
  if first == digest then return {'settled', limit_status(wallet), whole(charged), whole(uncollected)} end
  return {'ended'}
end
if not reservation then return {'ended'} end
if reservation.key ~= key then return {'key', reservation.key} end
redis.call('XLEN', KEYS[6])
local owns_key = has_key(KEYS[5], task, key)
local charged, uncollected = charge(wallet, reservation, cost)

local amounts = {}
for at = 1, #counters do amounts[counters[at].name] = counters[at].amount end

release(task, reservation, wallet, amounts, charged)
redis.call('XADD', KEYS[6], '*', 'record', record, 'cost', digits(charged),
  'uncollected', digits(uncollected))
redis.call('SET', KEYS[4], string.format('settled %s %s %s', digits(charged), digits(uncollected), digest),
  'EX', tombstone_ttl)
if owns_key and ARGV[5] == '1' then
  redis.call('HSET', KEYS[5], 'record', record, 'cost', digits(charged), 'uncollected', digits(uncollected),
    'answer', ARGV[6])
  redis.call('EXPIRE', KEYS[5], answer_ttl)
elseif owns_key then
  redis.call('DEL', KEYS[5])
end
wallet.available = wallet.available + reservation.amount - charged
return {'settled', limit_status(wallet), charged, uncollected}
