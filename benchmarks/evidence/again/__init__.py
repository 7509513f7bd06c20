"""The evidence again, with fresh seeds and in under an hour: `make evidence-again`. See __main__.py."""
