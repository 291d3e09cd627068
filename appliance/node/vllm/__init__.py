"""vLLM on this machine: its environments and their installation."""
