-- A wallet's limits and money now. KEYS: wallet, holds. ARGV: model, window in microseconds.
return standing(read_wallet(ARGV[1], whole(ARGV[2]), clock()))
