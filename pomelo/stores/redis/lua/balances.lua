-- Returns granted (with the credit limit), spent, held and the credit limit of each wallet. KEYS: wallets.
local balances = {}
for i = 1, #KEYS do
  for _, amount in ipairs(redis.call('HMGET', KEYS[i], 'granted', 'spent', 'held', 'credit_limit')) do
    table.insert(balances, amount or '0')
  end
end
return balances
