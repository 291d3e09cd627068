"""Chat messages to prompt text, and a model's reply back to a message."""
