-- Gives credits or takes them back, once per id. KEYS: wallet, holds, grants, acts. ARGV: id, amount, grant, act id,
-- act.
local wallet = read_wallet(clock(), {}, {})
local amount, limit = whole(ARGV[2]), whole(redis.call('HGET', KEYS[1], 'credit_limit'))
redis.call('HLEN', KEYS[4])
if redis.call('HEXISTS', KEYS[3], ARGV[1]) == 0 then
  if wallet.granted + amount > MAX_INTEGER then return {'full'} end
  if amount < 0 and wallet.available + amount < 0 then return {'overdrawn'} end
  local position = redis.call('HLEN', KEYS[3])
  redis.call('HSET', KEYS[3], ARGV[1], position .. ' ' .. ARGV[3])
  redis.call('HINCRBY', KEYS[1], 'granted', digits(amount))
  wallet.granted = wallet.granted + amount
  local granted = wallet.granted - limit
  write_act(4, ARGV[4], ARGV[5], digits(granted - amount), digits(granted))
end
return {'granted', wallet.granted - limit, wallet.spent, wallet.held, limit}
