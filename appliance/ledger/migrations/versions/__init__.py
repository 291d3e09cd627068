"""One module per revision, named after it; written by hand, never changed once released."""
