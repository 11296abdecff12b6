"""Direct Preference Optimization for language models that need more than one GPU."""

__version__ = "0.1.0"
