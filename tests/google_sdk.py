"""Google's SDK, whose source has an escape that Python warns of when it is compiled: an error in tests, not ours."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from google import genai
    from google.genai import errors, types
    from google.genai.client import AsyncClient

__all__ = ["AsyncClient", "errors", "genai", "types"]
