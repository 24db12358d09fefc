-- Ends a task of an owner that died: it is charged what was last noted, or nothing. Done once; its mark tells
-- the owner, should it live after all, that its hold is gone.
-- KEYS: wallet, holds, drafts, the task's mark, usage, the answer of its Idempotency-Key (or the mark again).
-- ARGV: task, owner, '=' and Idempotency-Key or '', window in microseconds, seconds of the mark
local task, span = ARGV[1], whole(ARGV[4])

local hold = read_hold(task)
if not hold or hold.owner ~= ARGV[2] then return {'gone'} end
if hold.key ~= ARGV[3] then return {'key', hold.key} end
local now = clock()
local wallet = read_wallet(hold.model, span, now)
local draft = redis.call('HGET', KEYS[3], task)
redis.call('GET', KEYS[4])
redis.call('XLEN', KEYS[5])
local waiting = answers(KEYS[6], task, hold.key)
local charged, uncollected = charge(wallet, hold, hold.cost)

free(task, hold)
if charged > 0 then redis.call('HINCRBY', KEYS[1], 'spent', digits(charged)) end
if hold.cost > 0 and draft then
  redis.call('XADD', KEYS[5], '*', 'record', draft, 'cost', digits(charged),
    'uncollected', digits(uncollected), 'recovered', string.format('%.6f', now / 1000000))
end
redis.call('SET', KEYS[4], hold.cost > 0 and 'recovered' or 'void ' .. hold.call, 'EX', ARGV[5])
if waiting then redis.call('DEL', KEYS[6]) end
return {'recovered'}
