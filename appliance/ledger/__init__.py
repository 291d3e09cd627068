"""What happened, durably: every decision, attempt, token count and cost. Prompts and answers are not among them.

`store` is the ledger a running node writes, `writer` the one thread that writes it, `queries` what is read from it,
`schema` and `migrations` the tables, `database` the only place that knows which database it is.
"""
