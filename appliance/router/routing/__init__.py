"""Which route a request takes, and which targets in which order. Pure."""
