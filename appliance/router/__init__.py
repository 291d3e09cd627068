"""One request, from what was asked to what was answered. `answer` is the table of contents; read it first."""
