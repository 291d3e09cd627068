"""Scoring labels: a trie of label tokens, searched as far as it can matter."""
