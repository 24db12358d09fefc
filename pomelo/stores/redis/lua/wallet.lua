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

-- The counters in ARGV, from `first` on: name, amount, limit ('': none) and window in microseconds (0: none).
local function read_counters(first)
  local counters = {}
  for at = first, #ARGV - 1, 4 do
    counters[#counters + 1] = {name = ARGV[at], amount = whole(ARGV[at + 1]), limit = tonumber(ARGV[at + 2]),
      span = whole(ARGV[at + 3])}
  end
  return counters
end

-- The fields of a wallet in which a counter has the start of its window and its number: tokens_at:gpt-4 and
-- tokens_window:gpt-4 of tokens:gpt-4, which has the count.
local function window_fields(name)
  local base, scope = string.match(name .. ':', '^(%l+)(:.*)$')
  if not base or base == 'granted' or base == 'spent' or base == 'held' then
    error('not the name of a counter: ' .. name)
  end
  scope = string.sub(scope, 1, -2)
  return base .. '_at' .. scope, base .. '_window' .. scope
end

-- A wallet's balance and its counts: of `counters`, those of the status that the script returns, and of `taken`,
-- those of a reservation. A count has `used`; with a window, what is `left` of it and its `number`.
local function read_wallet(now, counters, taken)
  local fields, counts = {'granted', 'spent', 'held'}, {}
  for _, list in ipairs({counters, taken}) do
    for _, counter in ipairs(list) do
      if not counts[counter.name] then
        local at, number = window_fields(counter.name)
        counts[counter.name] = {span = counter.span, first = #fields + 1, left = 0}
        fields[#fields + 1] = counter.name
        if counter.span > 0 then fields[#fields + 1], fields[#fields + 2] = at, number end
      end
    end
  end
  local found = redis.call('HMGET', KEYS[1], unpack(fields))
  local running = redis.call('HLEN', KEYS[2]) > 0
  for _, count in pairs(counts) do
    local used, is_open = whole(found[count.first]), running
    if count.span > 0 then
      count.left = left(whole(found[count.first + 1]), count.span, now)
      count.number = whole(found[count.first + 2])
      is_open = count.left > 0
    end
    -- What only running tasks take is 0 without any: no error that lost a release can last.
    count.used = is_open and used or 0
  end
  local wallet = {granted = whole(found[1]), spent = whole(found[2]), held = whole(found[3]), counts = counts,
    counters = counters}
  wallet.available = wallet.granted - wallet.spent - wallet.held
  return wallet
end

-- The use of the limits, in the form that all scripts return it: what is available, and of each counter the
-- count and what is left of its window.
local function limit_status(wallet)
  local status = {wallet.available}
  for _, counter in ipairs(wallet.counters) do
    local count = wallet.counts[counter.name]
    status[#status + 1], status[#status + 2] = count.used, count.left
  end
  return status
end

-- The text of a reservation. `call` distinguishes repeated reserve calls of one task. The rest are an
-- Idempotency-Key, preceded by its length in bytes, and what was counted: amount, number of the window and its
-- length in microseconds (0: no window), and the name, preceded by its length.
local function format_reservation(reservation)
  return string.format('%s %s %.0f %.0f %s', reservation.worker, reservation.call, reservation.amount,
    reservation.cost, reservation.rest)
end

local function format_counted(key, counters)
  local parts = {'k', #key, ' ', key}
  for _, counter in ipairs(counters) do
    parts[#parts + 1] = string.format(' %.0f %.0f %.0f %d ', counter.amount, counter.number or 0, counter.span,
      #counter.name)
    parts[#parts + 1] = counter.name
  end
  return table.concat(parts)
end

-- The rest of a reservation that a version before counters made: number of the window of requests, tokens, number
-- of their window (0: not counted), model and Idempotency-Key. It takes no concurrency.
local function read_old_counted(rest)
  local requests_window, tokens, tokens_window, length, names = string.match(rest, '^(%d+) (%d+) (%d+) (%d+) (.*)$')
  if not requests_window then return nil end
  local counters = {{name = 'requests', amount = 1, number = whole(requests_window), span = 60000000}}
  if whole(tokens_window) > 0 then
    counters[2] = {name = 'tokens:' .. string.sub(names, 1, length), amount = whole(tokens),
      number = whole(tokens_window), span = 60000000}
  end
  return string.sub(names, length + 1), counters
end

local function read_counted(rest)
  local length, start = string.match(rest, '^k(%d+) ()')
  if not length then return read_old_counted(rest) end
  local key, at, counters = string.sub(rest, start, start + length - 1), start + length, {}
  while at <= #rest do
    local amount, number, span, size, name = string.match(rest, '^ (%d+) (%d+) (%d+) (%d+) ()', at)
    at = name + size
    counters[#counters + 1] = {name = string.sub(rest, name, at - 1), amount = whole(amount),
      number = whole(number), span = whole(span)}
  end
  return key, counters
end

-- The reservation of a task, or nil.
local function read_reservation(task)
  local text = redis.call('HGET', KEYS[2], task)
  redis.call('HLEN', KEYS[3])
  if not text then return nil end
  local worker, call, amount, cost, rest = string.match(text, '^(%S+) (%S+) (%d+) (%d+) (.*)$')
  local key, counters
  if worker then key, counters = read_counted(rest) end
  if not key then error('not a reservation: ' .. task) end
  return {worker = worker, call = call, amount = whole(amount), cost = whole(cost), rest = rest, key = key,
    counters = counters}
end

-- Whether the Idempotency-Key of an answer belongs to `task`.
local function has_key(answer_key, task, key)
  return key ~= '' and redis.call('HGET', answer_key, 'task') == task
end

-- Releases a reservation, and counts `amounts`, by counter, in place of what was reserved in windows that are still
-- open. The first write of every script that ends a task: no server refuses it for memory.
local function release(task, reservation, wallet, amounts)
  redis.call('HDEL', KEYS[2], task)
  redis.call('HDEL', KEYS[3], task)
  if reservation.amount > 0 then redis.call('HINCRBY', KEYS[1], 'held', digits(-reservation.amount)) end
  for _, counter in ipairs(reservation.counters) do
    local count, change = wallet.counts[counter.name], 0
    if counter.span == 0 then
      change = -counter.amount
    elseif amounts[counter.name] and count.left > 0 and count.number == counter.number then
      change = amounts[counter.name] - counter.amount
    end
    if change ~= 0 then
      count.used = math.max(0, count.used + change)
      if count.used == 0 and counter.span == 0 then
        redis.call('HDEL', KEYS[1], counter.name)
      else
        redis.call('HSET', KEYS[1], counter.name, digits(count.used))
      end
    end
  end
end

-- Splits a cost into the part that can be charged and the part that can't.
local function charge(wallet, reservation, cost)
  local charged = math.min(cost, reservation.amount + wallet.available)
  return charged, cost - charged
end
