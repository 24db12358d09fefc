-- Changes a key's budget. KEYS: keys, budgets, acts. ARGV: id, budget or '', act id, act.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
local old = redis.call('HGET', KEYS[2], ARGV[1]) or ''
redis.call('HLEN', KEYS[3])
if old == ARGV[2] then return 1 end
if ARGV[2] == '' then redis.call('HDEL', KEYS[2], ARGV[1]) else redis.call('HSET', KEYS[2], ARGV[1], ARGV[2]) end
write_act(3, ARGV[3], ARGV[4], old)
return 1
