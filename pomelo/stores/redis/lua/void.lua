-- Releases a task's reservation without a charge. With a call, a task without a reservation gets a tombstone,
-- too: its reserve may still be on its way, and must not be done any more.
-- KEYS: wallet, reservations, drafts, the task's tombstone, the answer of its Idempotency-Key (or the tombstone
--       again).
-- ARGV: task, '1' to return its request and tokens, '=' and Idempotency-Key or '', window in microseconds,
--       the call of the reserve or '', TTL of the tombstone in seconds
local task, refund, key, span = ARGV[1], ARGV[2] == '1', ARGV[3], whole(ARGV[4])

local reservation = read_reservation(task)
local tombstone = redis.call('GET', KEYS[4])
if not reservation then
  if ARGV[5] ~= '' and not tombstone then redis.call('SET', KEYS[4], 'void ' .. ARGV[5], 'EX', ARGV[6]) end
  return {'void'}
end
-- The reservation of another reserve call, whose caller knows of it, stays.
if ARGV[5] ~= '' and reservation.call ~= ARGV[5] then return {'void'} end
if reservation.key ~= key then return {'key', reservation.key} end
local wallet = read_wallet(reservation.model, span, clock())
local owns_key = has_key(KEYS[5], task, key)

release(task, reservation)
if refund then
  local same_window = wallet.requests_left > 0 and wallet.requests_window == reservation.requests_window
  if same_window and wallet.requests > 0 then
    redis.call('HINCRBY', KEYS[1], 'requests', -1)
  end
  replace_tokens(wallet, reservation, 0)
end
if owns_key then redis.call('DEL', KEYS[5]) end
redis.call('SET', KEYS[4], 'void ' .. reservation.call, 'EX', ARGV[6])
return {'void'}
