-- Returns a wallet's use of its limits. KEYS: wallet, reservations. ARGV: counters.
return limit_status(read_wallet(clock(), read_counters(1), {}))
