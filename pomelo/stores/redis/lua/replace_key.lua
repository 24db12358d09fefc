-- Stores a successor and revokes a key, or lets it expire; both or neither. A repeated call changes nothing.
-- KEYS: keys, revocations, names, budgets, order of all keys, order of the account's keys, acts.
-- ARGV: id, time, the successor as in add_key, act id, act, the key's record, its record with an earlier expiry or
--       '' (it is revoked), its names with the successor.
local record = redis.call('HGET', KEYS[1], ARGV[1])
local revoked = redis.call('HGET', KEYS[2], ARGV[1])
local stored = redis.call('HGET', KEYS[1], ARGV[3])
local names = redis.call('HGET', KEYS[3], ARGV[1])
check_key_tables()
if stored then return stored == ARGV[4] and 1 or -1 end
local has_successor = names and cjson.decode(names)[3] ~= ''
if record ~= ARGV[11] or revoked or has_successor then return 0 end
store_key(3)
if ARGV[12] == '' then
  redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
else
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[12])
  redis.call('HSET', KEYS[3], ARGV[1], ARGV[13])
end
write_act(7, ARGV[9], ARGV[10])
return 1
