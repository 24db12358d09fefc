-- Changes an account's plan. KEYS: accounts, plans. ARGV: name, plan.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return 1
