-- Returns the values of the fields ARGV in each of the hashes KEYS, all of one moment.
local found = {}
for at = 1, #KEYS do found[at] = redis.call('HMGET', KEYS[at], unpack(ARGV)) end
return found
