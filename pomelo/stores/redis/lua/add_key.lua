-- Keeps a new key; repeated, it changes nothing. KEYS: keys, revocations.
-- ARGV: id, record, its time of revocation or ''.
local kept = redis.call('HGET', KEYS[1], ARGV[1])
if kept then return kept == ARGV[2] and 1 or 0 end
redis.call('HLEN', KEYS[2])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
if ARGV[3] ~= '' then redis.call('HSET', KEYS[2], ARGV[1], ARGV[3]) end
return 1
