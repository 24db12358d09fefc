-- Returns a wallet's use of its limits. KEYS: wallet, reservations. ARGV: model, window in microseconds.
return limit_status(read_wallet(ARGV[1], whole(ARGV[2]), clock()))
