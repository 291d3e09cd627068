"""Label probabilities from servers that tell log probabilities of tokens."""
