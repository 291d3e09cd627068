"""Speak to one target. Two transports: `local` for this node and its site, `egress` for everything beyond."""
