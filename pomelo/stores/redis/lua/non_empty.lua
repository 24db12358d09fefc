-- Returns the positions, from 1, of the keys that are not empty. An empty stream still exists, so streams are
-- counted; what is no stream must not hide the others. KEYS: one per wallet. ARGV: their table.
local found = {}
for i = 1, #KEYS do
  local count = 0
  if ARGV[1] == 'usage' then count = redis.pcall('XLEN', KEYS[i]) else count = redis.call('EXISTS', KEYS[i]) end
  if count ~= 0 then table.insert(found, i) end
end
return found
