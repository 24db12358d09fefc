-- Gives credits, once per id. KEYS: wallet, holds, grants. ARGV: id, amount, grant.
local wallet = read_wallet(clock(), {}, {})
local amount = whole(ARGV[2])
if redis.call('HEXISTS', KEYS[3], ARGV[1]) == 0 then
  if wallet.granted + amount > MAX_INTEGER then return {'full'} end
  local position = redis.call('HLEN', KEYS[3])
  redis.call('HSET', KEYS[3], ARGV[1], position .. ' ' .. ARGV[3])
  redis.call('HINCRBY', KEYS[1], 'granted', digits(amount))
  wallet.granted = wallet.granted + amount
end
return {'granted', wallet.granted, wallet.spent, wallet.held}
