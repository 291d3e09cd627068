"""What happened, durably: every decision, attempt, token count and cost. Prompts and answers are not among them.

`store` is the ledger that a running node uses; README.md says what the other modules are for.
"""
