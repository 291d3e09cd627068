"""The control plane: what the machine has, what fits, and the engines' lives."""
