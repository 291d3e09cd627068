"""Extraction: a text and a JSON schema in, an object that matches out."""
