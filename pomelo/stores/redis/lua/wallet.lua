-- The functions that every script of a wallet starts with. KEYS[1] is the wallet, KEYS[2] its reservations (the
-- key is named holds), KEYS[3] their drafts. The last of ARGV is empty; in tests, the time in microseconds.
--
-- A script is isolated, but not transactional: what it wrote before an error stays. So each script reads all
-- keys that it will write, which fails if one has a wrong type, then computes, and writes last. If a server
-- that is out of memory refuses a write, it is the first one; it never refuses that of a script that ends a task.

local MAX_INTEGER = 9007199254740991

-- Parses a whole number; 0 for a missing field.
local function whole(text)
  if not text then return 0 end
  local number = tonumber(text)
  if not number or number ~= math.floor(number) or math.abs(number) > MAX_INTEGER then
    error('not a whole number below 2^53: ' .. tostring(text))
  end
  return number
end

-- Formats a whole number. Lua's own conversion would round it to 14 digits.
local function digits(number) return string.format('%.0f', number) end

-- The server's time in microseconds.
local function clock()
  if ARGV[#ARGV] ~= '' then return whole(ARGV[#ARGV]) end
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end

-- Microseconds until a window ends; 0 if none is open. A window with a start in the future means that the
-- clock was set back: it lasts one more span at most.
local function left(at, span, now)
  if at == 0 then return 0 end
  return math.max(0, math.min(span, at + span - now))
end

-- All that a wallet counts; `tokens` are those of `model`.
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
  wallet.running = redis.call('HLEN', KEYS[2])
  return wallet
end

-- The use of the limits, in the form that all scripts return it.
local function limit_status(wallet)
  return {wallet.available, wallet.requests, wallet.requests_left, wallet.running, wallet.tokens,
    wallet.tokens_left}
end

-- The text of a reservation. `call` distinguishes repeated reserve calls of one task. If tokens_window is 0,
-- its tokens were not counted. The model is preceded by its length in bytes, an Idempotency-Key by '='.
local function format_reservation(reservation)
  return string.format('%s %s %.0f %.0f %.0f %.0f %.0f %d %s%s', reservation.worker, reservation.call,
    reservation.amount, reservation.cost, reservation.requests_window, reservation.tokens,
    reservation.tokens_window, #reservation.model, reservation.model, reservation.key)
end

-- The reservation of a task, or nil.
local function read_reservation(task)
  local text = redis.call('HGET', KEYS[2], task)
  redis.call('HLEN', KEYS[3])
  if not text then return nil end
  local worker, call, amount, cost, requests_window, tokens, tokens_window, length, rest =
    string.match(text, '^(%S+) (%S+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (.*)$')
  if not worker then error('not a reservation: ' .. task) end
  length = tonumber(length)
  return {worker = worker, call = call, amount = whole(amount), cost = whole(cost),
    requests_window = whole(requests_window), tokens = whole(tokens), tokens_window = whole(tokens_window),
    model = string.sub(rest, 1, length), key = string.sub(rest, length + 1)}
end

-- Whether the Idempotency-Key of an answer belongs to `task`.
local function has_key(answer_key, task, key)
  return key ~= '' and redis.call('HGET', answer_key, 'task') == task
end

-- Releases a reservation. The first write of every script that ends a task: no server refuses it for memory.
local function release(task, reservation)
  redis.call('HDEL', KEYS[2], task)
  redis.call('HDEL', KEYS[3], task)
  if reservation.amount > 0 then redis.call('HINCRBY', KEYS[1], 'held', digits(-reservation.amount)) end
end

-- Counts `tokens` in place of the reserved ones, if their window is still open.
local function replace_tokens(wallet, reservation, tokens)
  if wallet.tokens_left == 0 or wallet.tokens_window ~= reservation.tokens_window then return end
  local change = math.max(-wallet.tokens, tokens - reservation.tokens)
  wallet.tokens = wallet.tokens + change
  if change ~= 0 then redis.call('HINCRBY', KEYS[1], 'tokens:' .. reservation.model, digits(change)) end
end

-- Splits a cost into the part that can be charged and the part that can't.
local function charge(wallet, reservation, cost)
  local charged = math.min(cost, reservation.amount + wallet.available)
  return charged, cost - charged
end
