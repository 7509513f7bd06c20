"""The figure of both first pages, README and site: cost and benefit. `python -m front` in benchmarks/ draws it."""
