"""Wire formats: one package for each API dialect, and what they share. Pure."""
