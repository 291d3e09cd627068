"""Decisions: one choice of a label set, with probabilities."""
