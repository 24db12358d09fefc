-- What a wallet says is held, and what its tasks hold, at one moment. KEYS: wallet, holds, drafts.
local held, sum = whole(redis.call('HGET', KEYS[1], 'held')), 0
for _, task in ipairs(redis.call('HKEYS', KEYS[2])) do sum = sum + read_hold(task).held end
return {held, sum}
