-- Revokes a key. Revoking it again keeps the first time. KEYS: keys, revocations, acts. ARGV: id, time, act id, act.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HLEN', KEYS[3])
if redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[2]) == 0 then return 0 end
write_act(3, ARGV[3], ARGV[4])
return 1
