-- Says that an owner lives; 0: it was taken for dead. KEYS: owners. ARGV: owner.
if redis.call('HGET', KEYS[1], ARGV[1]) == 'dead' then return 0 end
return redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
