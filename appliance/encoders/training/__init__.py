"""Training a classifier: examples in, held-out figures and weights out."""
