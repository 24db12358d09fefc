-- Disables or enables an account. KEYS: accounts, the disabled ones, acts. ARGV: name, time ('': enable), act id, act.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
local disabled = redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1
redis.call('HLEN', KEYS[3])
if disabled == (ARGV[2] ~= '') then return 1 end
if disabled then redis.call('HDEL', KEYS[2], ARGV[1]) else redis.call('HSET', KEYS[2], ARGV[1], ARGV[2]) end
write_act(3, ARGV[3], ARGV[4])
return 1
