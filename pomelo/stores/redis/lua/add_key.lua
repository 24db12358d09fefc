-- Stores a new key. A repeated call changes nothing.
-- KEYS: keys, revocations, names, budgets, order of all keys, order of the account's keys, acts.
-- ARGV: id, record, its revocation time or '', its name and origin or '', its budget or '', its position in the
--       order, act id, act.
local stored = redis.call('HGET', KEYS[1], ARGV[1])
if stored then return stored == ARGV[2] and 1 or 0 end
check_key_tables()
store_key(1)
write_act(7, ARGV[7], ARGV[8])
return 1
