-- Notes the state in ARGV for a number of seconds. Returns 1 if it has changed, else 0. KEYS: that of the subject.
local changed = redis.call('GET', KEYS[1]) ~= ARGV[1]
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return changed and 1 or 0
