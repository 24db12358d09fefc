-- Stores a new key. A repeated call changes nothing.
-- KEYS: keys, revocations, order of all keys, order of the account's keys.
-- ARGV: id, record, its revocation time or '', its position in the order.
local stored = redis.call('HGET', KEYS[1], ARGV[1])
if stored then return stored == ARGV[2] and 1 or 0 end
redis.call('HLEN', KEYS[2])
redis.call('ZCARD', KEYS[3])
redis.call('ZCARD', KEYS[4])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
if ARGV[3] ~= '' then redis.call('HSET', KEYS[2], ARGV[1], ARGV[3]) end
redis.call('ZADD', KEYS[3], 0, ARGV[4])
redis.call('ZADD', KEYS[4], 0, ARGV[4])
return 1
