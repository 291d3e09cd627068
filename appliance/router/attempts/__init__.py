"""The attempt loop, and what one attempt does."""
