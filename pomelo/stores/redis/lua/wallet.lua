-- What every script of a wallet begins with. KEYS[1] is the wallet, KEYS[2] its holds, KEYS[3] their drafts;
-- the last of ARGV is the time in microseconds that a test says it is, and empty otherwise.
--
-- A script is isolated, not transactional: what it wrote before an error stays. So each reads all the keys
-- that it will write, which raises where one is of a wrong type, computes, and writes last. The first write
-- is one that a server that is out of memory may refuse, or, where a task ends, one that it never refuses.

local MOST = 9007199254740991

-- The whole number that a field holds; 0 where there is none.
local function whole(text)
  if not text then return 0 end
  local number = tonumber(text)
  if not number or number ~= math.floor(number) or math.abs(number) > MOST then
    error('not a whole number below 2^53: ' .. tostring(text))
  end
  return number
end

-- As digits: Lua's own way would round after 14 of them.
local function digits(number) return string.format('%.0f', number) end

-- Microseconds, of the server's clock.
local function clock()
  if ARGV[#ARGV] ~= '' then return whole(ARGV[#ARGV]) end
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end

-- Microseconds until a window ends, 0 where none is open. One that began in the future is of a clock that
-- was set back: it lasts a whole span more, at most.
local function left(at, span, now)
  if at == 0 then return 0 end
  return math.max(0, math.min(span, at + span - now))
end

-- All that a wallet counts, at a moment; `tokens` are those of `model`.
local function read_wallet(model, span, now)
  local found = redis.call('HMGET', KEYS[1], 'granted', 'spent', 'held', 'requests', 'requests_at',
    'requests_window', 'tokens:' .. model, 'tokens_at:' .. model, 'tokens_window:' .. model)
  local wallet = {granted = whole(found[1]), spent = whole(found[2]), held = whole(found[3])}
  wallet.available = wallet.granted - wallet.spent - wallet.held
  wallet.requests_window = whole(found[6])
  wallet.requests_left = left(whole(found[5]), span, now)
  wallet.requests = wallet.requests_left > 0 and whole(found[4]) or 0
  wallet.tokens_window = whole(found[9])
  wallet.tokens_left = left(whole(found[8]), span, now)
  wallet.tokens = wallet.tokens_left > 0 and whole(found[7]) or 0
  wallet.slots = redis.call('HLEN', KEYS[2])
  return wallet
end

-- The standing, as every script answers it.
local function standing(wallet)
  return {wallet.available, wallet.requests, wallet.requests_left, wallet.slots, wallet.tokens,
    wallet.tokens_left}
end

-- A hold is one text. Its call tells one take from another of the same task. A tokens_window of 0 is none:
-- its tokens were not counted. Its model has its length before it; '=' before an Idempotency-Key says that
-- there is one.
local function write_hold(hold)
  return string.format('%s %s %.0f %.0f %.0f %.0f %.0f %d %s%s', hold.owner, hold.call, hold.held, hold.cost,
    hold.requests_window, hold.tokens, hold.tokens_window, #hold.model, hold.model, hold.key)
end

-- The hold of a task, or nil.
local function read_hold(task)
  local text = redis.call('HGET', KEYS[2], task)
  redis.call('HLEN', KEYS[3])
  if not text then return nil end
  local owner, call, held, cost, requests_window, tokens, tokens_window, length, rest =
    string.match(text, '^(%S+) (%S+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (.*)$')
  if not owner then error('not a hold: ' .. task) end
  length = tonumber(length)
  return {owner = owner, call = call, held = whole(held), cost = whole(cost),
    requests_window = whole(requests_window), tokens = whole(tokens), tokens_window = whole(tokens_window),
    model = string.sub(rest, 1, length), key = string.sub(rest, length + 1)}
end

-- Whether the answer at `place` is waited for by `task` alone.
local function answers(place, task, key) return key ~= '' and redis.call('HGET', place, 'task') == task end

-- Frees what a hold held. The first write of every script that ends a task: no server refuses it for memory.
local function free(task, hold)
  redis.call('HDEL', KEYS[2], task)
  redis.call('HDEL', KEYS[3], task)
  if hold.held > 0 then redis.call('HINCRBY', KEYS[1], 'held', digits(-hold.held)) end
end

-- Puts `tokens` in the place of those that the hold took, where their window is still the open one.
local function replace_tokens(wallet, hold, tokens)
  if wallet.tokens_left == 0 or wallet.tokens_window ~= hold.tokens_window then return end
  local change = math.max(-wallet.tokens, tokens - hold.tokens)
  wallet.tokens = wallet.tokens + change
  if change ~= 0 then redis.call('HINCRBY', KEYS[1], 'tokens:' .. hold.model, digits(change)) end
end

-- Charges what can be had of a cost; gives it and what can't.
local function charge(wallet, hold, cost)
  local charged = math.min(cost, hold.held + wallet.available)
  return charged, cost - charged
end
