"""The figure of the README and of the first page: cost and benefit. `python -m front` in benchmarks/ draws it."""
