"""Who may come in: keys. The engine asks, once a call, before anything else."""
