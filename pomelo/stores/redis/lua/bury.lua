-- Takes an owner for dead, unless it has beaten since. KEYS: owners. ARGV: owner, its count as it was seen.
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], 'dead')
return 1
