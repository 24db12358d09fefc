-- Revokes a key. Revoking it again keeps the first time. KEYS: keys, revocations. ARGV: id, time.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
return redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[2])
