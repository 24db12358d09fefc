-- Writes an act of the operator to the hash KEYS[at], from which it is moved to the log. `old` and `new` replace its
-- values, unless they are nil. Without an id, no act is stored.
local function write_act(at, id, act, old, new)
  if id ~= '' then redis.call('HSET', KEYS[at], id, cjson.encode({act, old or false, new or false})) end
end
