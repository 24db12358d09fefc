-- Counts a heartbeat of a worker. Returns 0 if the worker was marked dead or, with '1', is not listed any more.
-- KEYS: workers. ARGV: worker, '1' or ''.
local count = redis.call('HGET', KEYS[1], ARGV[1])
if count == 'dead' or (not count and ARGV[2] == '1') then return 0 end
return redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
