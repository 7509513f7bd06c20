"""Whether LfU keeps more than SFT's own curve over rates and scales: `python -m study` in benchmarks/.

What is asked, the rule and the stopping time are in `hypotheses.md`, written before the first run that is judged.
"""
