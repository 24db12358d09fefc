-- Stores a new key. A repeated call changes nothing.
-- KEYS: keys, revocations, sorted places of all keys, sorted places of the account's keys.
-- ARGV: id, record, its revocation time or '', its place.
local kept = redis.call('HGET', KEYS[1], ARGV[1])
if kept then return kept == ARGV[2] and 1 or 0 end
redis.call('HLEN', KEYS[2])
redis.call('ZCARD', KEYS[3])
redis.call('ZCARD', KEYS[4])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
if ARGV[3] ~= '' then redis.call('HSET', KEYS[2], ARGV[1], ARGV[3]) end
redis.call('ZADD', KEYS[3], 0, ARGV[4])
redis.call('ZADD', KEYS[4], 0, ARGV[4])
return 1
