"""SAFT (arXiv:2410.10014): harmful rows of a fine-tuning set by a model's own activations."""
