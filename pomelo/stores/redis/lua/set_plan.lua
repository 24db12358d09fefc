-- Changes an account's plan. KEYS: accounts, plans, acts. ARGV: name, plan, act id, act.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
local old = redis.call('HGET', KEYS[2], ARGV[1])
redis.call('HLEN', KEYS[3])
if old ~= ARGV[2] then
  redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
  write_act(3, ARGV[3], ARGV[4], old)
end
return 1
