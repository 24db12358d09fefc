-- Returns the stored balances of wallets and the sums of their grants and holds, all at one moment.
-- KEYS, for each wallet: the wallet, its holds, its grants. Six numbers for each wallet: whether it
-- exists, granted, spent, held, the sum of its grants, the sum of what its tasks hold.
local states = {}
for i = 1, #KEYS, 3 do
  local found = redis.call('HMGET', KEYS[i], 'granted', 'spent', 'held')
  local holding, given = 0, 0
  for _, hold in ipairs(redis.call('HVALS', KEYS[i + 1])) do
    holding = holding + whole(string.match(hold, '^%S+ %S+ (%d+) ') or 'no hold')
  end
  for _, grant in ipairs(redis.call('HVALS', KEYS[i + 2])) do
    given = given + whole(cjson.decode(string.sub(grant, string.find(grant, ' ') + 1)).amount)
  end
  for _, number in ipairs({redis.call('EXISTS', KEYS[i]), whole(found[1]), whole(found[2]), whole(found[3]),
    given, holding}) do
    table.insert(states, number)
  end
end
return states
