"""What goes into the next step: sequences, their order, fairness, threads."""
