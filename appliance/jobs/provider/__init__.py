"""Lines that leave in a provider's own batch."""
