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

-- The counters in ARGV, from `first` on: name, amount, limit ('': none) and window in microseconds (0: none). Each
-- remembers where it was.
local function read_counters(first)
  local counters = {}
  for at = first, #ARGV - 1, 4 do
    counters[#counters + 1] = {name = ARGV[at], amount = tonumber(ARGV[at + 1]), limit = tonumber(ARGV[at + 2]),
      span = tonumber(ARGV[at + 3]), used = 0, left = 0, number = 0, first = at}
  end
  return counters
end

-- The fields of a wallet in which a counter has the start of its window and its number: tokens_at:gpt-4 and
-- tokens_window:gpt-4 of tokens:gpt-4, which has the count.
local function window_fields(name)
  local colon = string.find(name, ':', 1, true)
  if not colon then return name .. '_at', name .. '_window' end
  local word, scope = string.sub(name, 1, colon - 1), string.sub(name, colon)
  return word .. '_at' .. scope, word .. '_window' .. scope
end

-- A wallet's balance and its counts by name: of `counters`, those of the status that the script returns, and of
-- `taken`, those of a reservation. Sets what each has `used` and, with a window, what is `left` of it and its
-- `number`.
local function read_wallet(now, counters, taken)
  local fields, counts, all = {'granted', 'spent', 'held'}, {}, {}
  for at = 1, #counters + #taken do
    local counter = counters[at] or taken[at - #counters]
    if not counts[counter.name] then
      counts[counter.name], all[#all + 1] = counter, counter
      fields[#fields + 1] = counter.name
      if counter.span > 0 then
        local size = #fields
        fields[size + 1], fields[size + 2] = window_fields(counter.name)
      end
    end
  end
  local found = redis.call('HMGET', KEYS[1], unpack(fields))
  local running, field = redis.call('HLEN', KEYS[2]) > 0, 4
  for at = 1, #all do
    local counter, is_open = all[at], running
    local used = whole(found[field])
    field = field + 1
    if counter.span > 0 then
      counter.left, counter.number = left(whole(found[field]), counter.span, now), whole(found[field + 1])
      is_open, field = counter.left > 0, field + 2
    end
    -- What only running tasks take is 0 without any: no error that lost a release can last.
    counter.used = is_open and used or 0
  end
  local wallet = {granted = whole(found[1]), spent = whole(found[2]), held = whole(found[3]), counts = counts,
    counters = counters, available = 0}
  wallet.available = wallet.granted - wallet.spent - wallet.held
  return wallet
end

-- The budget of that name, and what is `used` of it, in the period that began at `start`, or in a later one that is
-- stored. Nil without a name.
local function read_budget(name, start)
  if name == '' then return nil end
  local found = redis.call('HMGET', KEYS[1], name, (window_fields(name)))
  local stored = whole(found[2])
  if start > stored then return {name = name, used = 0, start = start} end
  return {name = name, used = whole(found[1]), start = stored}
end

-- The use of the limits, in the form that all scripts return it: what is available, and of each counter the
-- count and what is left of its window.
local function limit_status(wallet)
  local status = {wallet.available}
  for at = 1, #wallet.counters do
    status[2 * at], status[2 * at + 1] = wallet.counters[at].used, wallet.counters[at].left
  end
  return status
end

-- The text of a reservation. `call` distinguishes repeated reserve calls of one task. The rest is JSON: the
-- Idempotency-Key; of each counter the name, what was counted, the number of the window and its length in
-- microseconds (0: no window); and, if there is one, the name and the start of the budget.
local function format_reservation(reservation)
  return string.format('%s %s %.0f %.0f %s', reservation.worker, reservation.call, reservation.amount,
    reservation.cost, reservation.rest)
end

local function format_counted(key, counters, budget)
  local counted = {}
  for at = 1, #counters do
    local counter = counters[at]
    counted[at] = {counter.name, ARGV[counter.first + 1], counter.number, ARGV[counter.first + 3]}
  end
  return cjson.encode({key, counted, budget and {budget.name, digits(budget.start)}})
end

-- The rest of a reservation that a version before counters made: number of the window of requests, tokens, number
-- of their window (0: not counted), length of the model in bytes, model and Idempotency-Key. It takes no
-- concurrency.
local function read_old_counted(rest)
  local requests_window, tokens, tokens_window, length, names = string.match(rest, '^(%d+) (%d+) (%d+) (%d+) (.*)$')
  if not requests_window then return nil end
  local counted = {{'requests', 1, requests_window, 60000000}}
  if tokens_window ~= '0' then
    counted[2] = {'tokens:' .. string.sub(names, 1, length), tokens, tokens_window, 60000000}
  end
  return {string.sub(names, length + 1), counted}
end

-- The reservation of a task, or nil. Its counters counted in the `window` of that number.
local function read_reservation(task)
  local text = redis.call('HGET', KEYS[2], task)
  redis.call('HLEN', KEYS[3])
  if not text then return nil end
  local worker, call, amount, cost, rest = string.match(text, '^(%S+) (%S+) (%d+) (%d+) (.*)$')
  local parts
  if worker then parts = string.sub(rest, 1, 1) == '[' and cjson.decode(rest) or read_old_counted(rest) end
  if not parts then error('not a reservation: ' .. task) end
  local counters = {}
  for at = 1, #parts[2] do
    local counted = parts[2][at]
    counters[at] = {name = counted[1], amount = whole(counted[2]), window = whole(counted[3]),
      span = whole(counted[4]), used = 0, left = 0, number = 0}
  end
  return {worker = worker, call = call, amount = whole(amount), cost = whole(cost), rest = rest, key = parts[1],
    counters = counters, budget = parts[3]}
end

-- Whether the Idempotency-Key of an answer belongs to `task`.
local function has_key(answer_key, task, key)
  return key ~= '' and redis.call('HGET', answer_key, 'task') == task
end

-- Releases a reservation, charges `charged`, and counts `amounts`, by counter, in place of what was reserved in
-- windows that are still open. The first write of every script that ends a task: no server refuses it for memory.
local function release(task, reservation, wallet, amounts, charged)
  redis.call('HDEL', KEYS[2], task)
  redis.call('HDEL', KEYS[3], task)
  local changed = {'held', digits(wallet.held - reservation.amount), 'spent', digits(wallet.spent + charged)}
  for at = 1, #reservation.counters do
    local counter = reservation.counters[at]
    local count, running, change = wallet.counts[counter.name], counter.span == 0, 0
    if running then
      change = -counter.amount
    elseif amounts[counter.name] and count.left > 0 and count.number == counter.window then
      change = amounts[counter.name] - counter.amount
    end
    count.used = math.max(0, count.used + change)
    if running and count.used == 0 then
      redis.call('HDEL', KEYS[1], counter.name)  -- also if the task took 0 of it
    elseif change ~= 0 then
      changed[#changed + 1], changed[#changed + 2] = counter.name, digits(count.used)
    end
  end
  local counted = reservation.budget
  local budget = counted and read_budget(counted[1], whole(counted[2]))
  if budget and digits(budget.start) == counted[2] then
    changed[#changed + 1] = budget.name
    changed[#changed + 1] = digits(math.max(0, budget.used + charged - reservation.amount))
  end
  redis.call('HSET', KEYS[1], unpack(changed))
end

-- Splits a cost into the part that can be charged and the part that can't.
local function charge(wallet, reservation, cost)
  local charged = math.min(cost, reservation.amount + wallet.available)
  return charged, cost - charged
end
