"""Does it help: the runs behind docs/evidence.md. `make evidence` from the project's folder."""
