-- Stores a successor and revokes a key, both or neither. A repeated call changes nothing.
-- KEYS: keys, revocations, order of all keys, order of the account's keys.
-- ARGV: id, time, the successor's id, its record, its revocation time or '', its position in the order.
local known = redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1
local revoked = redis.call('HGET', KEYS[2], ARGV[1])
local stored = redis.call('HGET', KEYS[1], ARGV[3])
redis.call('ZCARD', KEYS[3])
redis.call('ZCARD', KEYS[4])
if known and revoked == ARGV[2] and stored == ARGV[4] then return 1 end
if not known or revoked then return 0 end
if stored then return -1 end
redis.call('HSET', KEYS[1], ARGV[3], ARGV[4])
if ARGV[5] ~= '' then redis.call('HSET', KEYS[2], ARGV[3], ARGV[5]) end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[3], 0, ARGV[6])
redis.call('ZADD', KEYS[4], 0, ARGV[6])
return 1
