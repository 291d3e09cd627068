"""From logits to tokens to text: sampling, constraints, speculation."""
