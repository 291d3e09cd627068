"""How a task becomes calls: readers turn a body into what was asked and the calls that answer it. Pure, no I/O.

Every reader is `read(body) -> (Asked, calls)` and raises RequestError naming the field, its value and the remedy.
"""
