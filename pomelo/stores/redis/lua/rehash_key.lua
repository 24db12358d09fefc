-- Replaces the digest of a key, and notes the secret that it was made with. Does nothing if the key has another digest.
-- KEYS: keys, secrets. ARGV: id, old digest, new digest, id of the secret.
local stored = redis.call('HGET', KEYS[1], ARGV[1])
if not stored then return 0 end
-- The record is not decoded: that would round its times.
local first, last = string.find(stored, '"digest":"' .. ARGV[2] .. '"', 1, true)
if not first then return 0 end
redis.call('HLEN', KEYS[2])
local digest = '"digest":"' .. ARGV[3] .. '"'
redis.call('HSET', KEYS[1], ARGV[1], string.sub(stored, 1, first - 1) .. digest .. string.sub(stored, last + 1))
redis.call('HSET', KEYS[2], ARGV[1], ARGV[4])
return 1
