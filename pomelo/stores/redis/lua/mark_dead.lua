-- Marks a worker dead, unless it has sent a heartbeat since its count was read.
-- KEYS: workers. ARGV: worker, count of its heartbeats.
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], 'dead')
return 1
