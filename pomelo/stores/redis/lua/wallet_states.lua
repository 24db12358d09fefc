-- Returns the stored balances of wallets and the sums of their grants and reservations, all of one moment.
-- KEYS, for each wallet: the wallet, its reservations, its grants. Returns seven numbers for each wallet: whether
-- it exists, granted, spent, held, the credit limit, the sum of its grants, the sum of its reservations.
local states = {}
for i = 1, #KEYS, 3 do
  local found = redis.call('HMGET', KEYS[i], 'granted', 'spent', 'held', 'credit_limit')
  local reservations, grants = 0, 0
  for _, text in ipairs(redis.call('HVALS', KEYS[i + 1])) do
    -- One that can't be read is 0: the difference to what is held shows it.
    reservations = reservations + whole(string.match(text, '^%S+ %S+ (%d+) '))
  end
  for _, text in ipairs(redis.call('HVALS', KEYS[i + 2])) do
    grants = grants + whole(cjson.decode(string.sub(text, string.find(text, ' ') + 1)).amount)
  end
  local limit = whole(found[4])
  for _, number in ipairs({redis.call('EXISTS', KEYS[i]), whole(found[1]) - limit, whole(found[2]),
    whole(found[3]), limit, grants, reservations}) do
    table.insert(states, number)
  end
end
return states
