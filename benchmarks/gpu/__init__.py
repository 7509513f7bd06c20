"""Every figure from a GPU by one command, on a machine that has torch and a checkout and nothing else: docs/gpu.md."""
