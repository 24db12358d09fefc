-- Reads what `store_key` writes, which fails if a key has a wrong type.
local function check_key_tables()
  for at = 2, 4 do redis.call('HLEN', KEYS[at]) end
  redis.call('ZCARD', KEYS[5])
  redis.call('ZCARD', KEYS[6])
  redis.call('HLEN', KEYS[7])
end

-- Stores the key in ARGV, from `first` on: id, record, revocation time, name and origin, budget, position.
local function store_key(first)
  local id = ARGV[first]
  redis.call('HSET', KEYS[1], id, ARGV[first + 1])
  for at = 2, 4 do
    if ARGV[first + at] ~= '' then redis.call('HSET', KEYS[at], id, ARGV[first + at]) end
  end
  redis.call('ZADD', KEYS[5], 0, ARGV[first + 5])
  redis.call('ZADD', KEYS[6], 0, ARGV[first + 5])
end
