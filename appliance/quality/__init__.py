"""How good answers are, and what is made of that: classifiers that learn from what better models and callers say."""
