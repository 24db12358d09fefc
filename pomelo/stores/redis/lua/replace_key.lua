-- Keeps a successor and revokes a key, both or neither; repeated, it changes nothing.
-- KEYS: keys, revocations, sorted places of all keys, sorted places of the account's keys.
-- ARGV: id, time, the successor's id, its record, its revocation time or '', its place.
local known = redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1
local revoked = redis.call('HGET', KEYS[2], ARGV[1])
local kept = redis.call('HGET', KEYS[1], ARGV[3])
redis.call('ZCARD', KEYS[3])
redis.call('ZCARD', KEYS[4])
if known and revoked == ARGV[2] and kept == ARGV[4] then return 1 end
if not known or revoked then return 0 end
if kept then return -1 end
redis.call('HSET', KEYS[1], ARGV[3], ARGV[4])
if ARGV[5] ~= '' then redis.call('HSET', KEYS[2], ARGV[3], ARGV[5]) end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[3], 0, ARGV[6])
redis.call('ZADD', KEYS[4], 0, ARGV[6])
return 1
