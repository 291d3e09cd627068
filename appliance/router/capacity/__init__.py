"""Whether a target has room now, and when it would answer."""
