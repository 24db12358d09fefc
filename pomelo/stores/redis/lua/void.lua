-- Frees all that a task took. With a call also where there is no hold (yet) the task is marked: its take may
-- still be on its way, and must not be done any more.
-- KEYS: wallet, holds, drafts, the task's mark, the answer of its Idempotency-Key (or the mark again).
-- ARGV: task, '1' to give back its request and tokens, '=' and Idempotency-Key or '', window in microseconds,
--       the call of the take or '', seconds of the mark
local task, refund, key, span = ARGV[1], ARGV[2] == '1', ARGV[3], whole(ARGV[4])

local hold = read_hold(task)
local mark = redis.call('GET', KEYS[4])
if not hold then
  if ARGV[5] ~= '' and not mark then redis.call('SET', KEYS[4], 'void ' .. ARGV[5], 'EX', ARGV[6]) end
  return {'void'}
end
-- What another take of the task took, and was told, is not to be undone.
if ARGV[5] ~= '' and hold.call ~= ARGV[5] then return {'void'} end
if hold.key ~= key then return {'key', hold.key} end
local wallet = read_wallet(hold.model, span, clock())
local waiting = answers(KEYS[5], task, key)

free(task, hold)
if refund then
  if wallet.requests_left > 0 and wallet.requests_window == hold.requests_window and wallet.requests > 0 then
    redis.call('HINCRBY', KEYS[1], 'requests', -1)
  end
  replace_tokens(wallet, hold, 0)
end
if waiting then redis.call('DEL', KEYS[5]) end
redis.call('SET', KEYS[4], 'void ' .. hold.call, 'EX', ARGV[6])
return {'void'}
