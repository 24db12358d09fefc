-- Notes the cost and record of running tasks so far. Returns the tasks without a reservation.
-- KEYS: wallet, reservations, drafts. ARGV: task, cost, record, and again for each task.
local lost, noted = {}, {}
for at = 1, #ARGV - 1, 3 do
  local reservation = read_reservation(ARGV[at])
  if reservation then
    reservation.cost = whole(ARGV[at + 1])
    noted[#noted + 1] = {ARGV[at], format_reservation(reservation), ARGV[at + 2]}
  else
    lost[#lost + 1] = ARGV[at]
  end
end
for _, each in ipairs(noted) do
  redis.call('HSET', KEYS[2], each[1], each[2])
  redis.call('HSET', KEYS[3], each[1], each[3])
end
return lost
