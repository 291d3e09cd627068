"""Which models run here, in which variant and where. Pure."""
