"""Personal and secret data in a request's content: which kinds there are, never what they say.

`texts` takes from a body what a model would read, `find` searches it. Pure; patterns are compiled once, each of them is
bounded in what it can try, and check digits decide wherever the format has some.
"""
