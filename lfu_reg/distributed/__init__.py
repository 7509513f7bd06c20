"""Several processes: which engine spreads the model over them, and what the step asks of it.

The regularizer adds no communication of its own but for two things that `docs/distributed.md` counts: one number at
steps 1, 10, 100, ... under engines whose forward communicates, and g with `sync_perturbation=True`.
"""
