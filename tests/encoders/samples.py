"""Small labelled texts that a classifier can learn: made of words that go with their label, and noise."""

import random

_WORDS = {
    "delivery": ["parcel", "courier", "tracking", "shipped", "arrive", "doorstep", "late package"],
    "billing": ["invoice", "charged twice", "refund", "payment", "card statement", "receipt"],
    "login": ["password", "sign in", "locked account", "two factor", "username", "reset link"],
}
_NOISE = ["please", "help", "today", "my", "the", "again", "why", "hello", "since", "yesterday", "can you", "urgent"]


def labelled(count: int, seed: int = 0, unclear: float = 0.0) -> list[dict[str, str]]:
    """`count` different texts; a share `unclear` of them has only noise in it."""
    chance = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        label = chance.choice(sorted(_WORDS))
        own = [] if chance.random() < unclear else chance.sample(_WORDS[label], 2)
        words = own + chance.sample(_NOISE, 4)
        chance.shuffle(words)
        rows.setdefault(f"{' '.join(words)} {len(rows)}", label)
    return [{"text": text, "label": label} for text, label in rows.items()]
