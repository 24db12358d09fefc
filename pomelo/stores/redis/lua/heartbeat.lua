-- Counts a heartbeat of a worker. Returns 0 if the worker was marked dead. KEYS: workers. ARGV: worker.
if redis.call('HGET', KEYS[1], ARGV[1]) == 'dead' then return 0 end
return redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
