"""Engines as child processes: start, health, restart, swap, stop."""
