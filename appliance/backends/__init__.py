"""Speak to one target. Two doors: `local` for this node and its site, `egress` for everything beyond."""
