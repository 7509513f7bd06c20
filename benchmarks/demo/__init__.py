"""The demo: a small model fine-tuned with and without LfU. `make demo`, or `python -m demo` in benchmarks/."""
