"""KV memory: which cells a sequence has, the prefix cache, what is given back to the system."""
