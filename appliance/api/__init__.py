"""HTTP in, HTTP out, no decisions: who asks, what they sent, and answers that say where they came from."""
