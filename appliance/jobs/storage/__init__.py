"""What jobs keep on disk: files, tables, results."""
