-- Notes what running tasks have used; gives those whose hold is gone.
-- KEYS: wallet, holds, drafts. ARGV: task, cost, record, and so on.
local gone, noted = {}, {}
for at = 1, #ARGV - 1, 3 do
  local hold = read_hold(ARGV[at])
  if hold then
    hold.cost = whole(ARGV[at + 1])
    noted[#noted + 1] = {ARGV[at], write_hold(hold), ARGV[at + 2]}
  else
    gone[#gone + 1] = ARGV[at]
  end
end
for _, each in ipairs(noted) do
  redis.call('HSET', KEYS[2], each[1], each[2])
  redis.call('HSET', KEYS[3], each[1], each[3])
end
return gone
