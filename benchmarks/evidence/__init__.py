"""Does it help: the runs behind docs/evidence-data.md. `make evidence` from the project's folder."""
