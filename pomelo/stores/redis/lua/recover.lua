-- Recovers a task of a dead worker: charges its last noted cost, if any. The tombstone shows the worker, if it
-- lives after all, that its reservation is gone.
-- KEYS: wallet, reservations, drafts, the task's tombstone, the answer of its Idempotency-Key (or the tombstone
--       again), usage.
-- ARGV: task, worker, '=' and Idempotency-Key or '', TTL of the tombstone in seconds
local task = ARGV[1]

local reservation = read_reservation(task)
if not reservation or reservation.worker ~= ARGV[2] then return {'ended'} end
if reservation.key ~= ARGV[3] then return {'key', reservation.key} end
local now = clock()
local wallet = read_wallet(now, {}, reservation.counters)
local draft = redis.call('HGET', KEYS[3], task)
redis.call('GET', KEYS[4])
redis.call('XLEN', KEYS[6])
local owns_key = has_key(KEYS[5], task, reservation.key)
local charged, uncollected = charge(wallet, reservation, reservation.cost)

release(task, reservation, wallet, {}, charged)
if reservation.cost > 0 and draft then
  redis.call('XADD', KEYS[6], '*', 'record', draft, 'cost', digits(charged),
    'uncollected', digits(uncollected), 'recovered', string.format('%.6f', now / 1000000))
end
redis.call('SET', KEYS[4], reservation.cost > 0 and 'recovered' or 'void ' .. reservation.call, 'EX', ARGV[4])
if owns_key then redis.call('DEL', KEYS[5]) end
return {'recovered'}
