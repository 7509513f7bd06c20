"""Learning-from-the-Undesirable (LfU) for any PyTorch fine-tuning loop."""

__version__ = "0.1.0"
