"""Model files on this machine: sources, download, verification, headers."""
