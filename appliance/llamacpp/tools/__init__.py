"""Tool calls and reasoning in a model's own words: read out of its replies, and held to their schemas while written."""
