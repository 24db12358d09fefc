-- Releases a task's reservation without a charge. With a call, a task without a reservation gets a tombstone,
-- too: its reserve may still be on its way, and must not be done any more.
-- KEYS: wallet, reservations, drafts, the task's tombstone, the answer of its Idempotency-Key (or the tombstone
--       again).
-- ARGV: task, '1' to return what it counted in windows, '=' and Idempotency-Key or '', the call of the reserve or
--       '', TTL of the tombstone in seconds
local task, refund, key, call = ARGV[1], ARGV[2] == '1', ARGV[3], ARGV[4]

local reservation = read_reservation(task)
local tombstone = redis.call('GET', KEYS[4])
if not reservation then
  if call ~= '' and not tombstone then redis.call('SET', KEYS[4], 'void ' .. call, 'EX', ARGV[5]) end
  return {'void'}
end
-- The reservation of another reserve call, whose caller knows of it, stays.
if call ~= '' and reservation.call ~= call then return {'void'} end
if reservation.key ~= key then return {'key', reservation.key} end
local wallet = read_wallet(clock(), {}, reservation.counters)
local owns_key = has_key(KEYS[5], task, key)
local amounts = {}
if refund then
  for at = 1, #reservation.counters do amounts[reservation.counters[at].name] = 0 end
end

release(task, reservation, wallet, amounts, 0)
if owns_key then redis.call('DEL', KEYS[5]) end
redis.call('SET', KEYS[4], 'void ' .. reservation.call, 'EX', ARGV[5])
return {'void'}
