"""One form for what texts write in many: dates, amounts, numbers and terms of a list.

Every reader takes the words as they are written and gives a `Form`. What can be read in two ways is not guessed: the
value is None then, and `reason` says what would settle it.
"""
