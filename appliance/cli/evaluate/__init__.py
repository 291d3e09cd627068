"""appliance eval: how good models are on rows whose answers are known."""
