-- Creates an account. A repeated call of the same caller changes nothing.
-- KEYS: accounts, plans, names in order, acts. ARGV: name, plan, time and caller id, act id, act.
local stored = redis.call('HGET', KEYS[1], ARGV[1])
redis.call('HLEN', KEYS[2])
redis.call('ZCARD', KEYS[3])
redis.call('HLEN', KEYS[4])
if stored then return stored == ARGV[3] and 1 or 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[3], 0, ARGV[1])
write_act(4, ARGV[4], ARGV[5])
return 1
