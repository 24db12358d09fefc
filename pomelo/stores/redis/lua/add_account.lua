-- Makes an account; repeated by the same caller, it changes nothing.
-- KEYS: accounts, plans, sorted names. ARGV: name, plan, time and caller.
local kept = redis.call('HGET', KEYS[1], ARGV[1])
redis.call('HLEN', KEYS[2])
redis.call('ZCARD', KEYS[3])
if kept then return kept == ARGV[3] and 1 or 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[3], 0, ARGV[1])
return 1
