-- Notes the state in ARGV for a number of seconds. Returns 1 if it has changed, else 0; a repeated call returns the
-- same again. KEYS: that of the subject. ARGV: state, seconds, id of the call.
local stored, noted = redis.call('GET', KEYS[1]), ARGV[1] .. '\n' .. ARGV[3]
-- A version before stored the state alone.
if stored and stored ~= noted and (stored == ARGV[1] or string.match(stored, '^(.*)\n') == ARGV[1]) then
  redis.call('EXPIRE', KEYS[1], ARGV[2])
  return 0
end
redis.call('SET', KEYS[1], noted, 'EX', ARGV[2])
return 1
