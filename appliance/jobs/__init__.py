"""Files and batches: work that can wait, line by line, in capacity that nobody else wants. README.md is the way in."""
