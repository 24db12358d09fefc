"""The gRPC front end (servers and servicers) and the gRPC client (`remote`)."""
