-- Changes a wallet's credit limit, which `granted` includes. KEYS: wallet, holds, acts. ARGV: limit, act id, act.
local wallet = read_wallet(clock(), {}, {})
local limit, old = whole(ARGV[1]), whole(redis.call('HGET', KEYS[1], 'credit_limit'))
redis.call('HLEN', KEYS[3])
local granted = wallet.granted + limit - old
if limit ~= old then
  if granted > MAX_INTEGER then return {'full'} end
  if limit < old and wallet.available + limit - old < 0 then return {'overdrawn'} end
  redis.call('HSET', KEYS[1], 'granted', digits(granted), 'credit_limit', digits(limit))
  write_act(3, ARGV[2], ARGV[3], digits(old))
end
return {'granted', granted - limit, wallet.spent, wallet.held, limit}
