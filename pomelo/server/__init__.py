"""The gRPC door: servicers over the ports, and the server that carries them."""
