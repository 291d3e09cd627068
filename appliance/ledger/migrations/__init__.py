"""Alembic's script folder: `env` runs a migration, `versions` holds them."""
