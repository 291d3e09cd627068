"""The lines of a batch: read, validated, queued, executed."""
