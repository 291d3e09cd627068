"""Token counts before a tokenizer has seen the text: estimates, for admission and for sizing answers, not for money."""

CHARACTERS_PER_TOKEN = 4.0
"""English prose on byte-pair vocabularies of 30,000 to 200,000 entries; the usual rule of thumb."""

MESSAGE_TOKENS = 5
"""What a chat template adds around one message: role and turn markers."""


def estimate_tokens(text: str) -> int:
    """About how many tokens `text` has.

    Text outside ASCII counts half by its UTF-8 bytes, so that scripts which vocabularies cover badly do not look cheap.
    """
    if not text:
        return 0
    length = len(text) if text.isascii() else (len(text) + len(text.encode("utf-8", "replace"))) / 2
    return max(1, round(length / CHARACTERS_PER_TOKEN))
