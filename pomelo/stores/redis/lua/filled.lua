-- Which of some keys have something in them: their numbers, from 1. A stream stays when it is empty.
local filled = {}
for i = 1, #KEYS do
  local count = 0
  if ARGV[1] == 'usage' then count = redis.call('XLEN', KEYS[i]) else count = redis.call('EXISTS', KEYS[i]) end
  if count > 0 then table.insert(filled, i) end
end
return filled
