"""What Alembic runs: it migrates the connection it was handed, inside the transaction that is already open there."""

from alembic import context

from appliance.ledger.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
