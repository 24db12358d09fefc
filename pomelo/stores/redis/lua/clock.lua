-- Returns the server's time: seconds and microseconds. KEYS: any key, which selects the node of a cluster.
return redis.call('TIME')
