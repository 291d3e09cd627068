"""What comes next, guessed from what was there before: drafts that a step computes beside the token they follow.

A step reads all weights however few tokens it computes, so a guess that is right saves a sequence a step, and one that
is wrong costs a row. Three tokens are looked up in the sequence itself, which finds what is copied out of a prompt, and
in the other answers of the same cache salt, which finds what a schema or the model itself repeats. Both are
believed as far as they have been right, whether or not anything was drafted. Nothing here decides about an answer: the
sampler does, and a draft is kept as far as it says the same.
"""

from collections import OrderedDict
from typing import Final

import numpy as np

from appliance.llamacpp.kv.prefix_cache import Tokens

MAX_DRAFT_TOKENS: Final = 8
"""Tokens of one draft. Guesses that far ahead are rarely sure enough."""
_TOKEN_BITS: Final = 20
"""Keys are three tokens in one integer. Larger vocabularies make different keys equal, which only spoils guesses."""
_KEY_TOKENS: Final = 3
_KEY_MASK: Final = (1 << (_KEY_TOKENS * _TOKEN_BITS)) - 1
_TOKEN_MASK: Final = (1 << _TOKEN_BITS) - 1
_COUNT_BITS: Final = 10
_COUNT_MASK: Final = (1 << _COUNT_BITS) - 1
_HALVED_AT: Final = 64
"""Old counts lose weight: at so many, both are halved."""
_OWN_RATE: Final = 0.15
_TABLE_RATE: Final = 0.02
_UNKNOWN: Final = 0.5
_MAX_KEYS: Final = 8_192
"""Keys of one generation; two are kept, about 2 MB for a cache salt."""
_MAX_TABLES: Final = 16


class NgramTable:
    """What followed each three tokens in the answers of one cache salt. The engine's thread only.

    A value is one integer: the token that follows, how often it did and how often another one did. Integers make no
    work for the garbage collector.
    """

    __slots__ = ("_old", "_young", "copy_rates", "repeat_rate")

    def __init__(self) -> None:
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}
        self.repeat_rate = _UNKNOWN
        """How often what was seen once came again."""
        self.copy_rates = [_UNKNOWN, _UNKNOWN]
        """How often the sequence's own past predicted the next token: after it had been wrong or silent, and after it
        had been right."""

    def record(self, key: int, token: int) -> None:
        """`token` followed `key`."""
        value = self._young.get(key)
        if value is None:
            value = self._old.pop(key, None)
        if value is None:
            value = token | 1 << _TOKEN_BITS
        else:
            hits, misses = value >> _TOKEN_BITS & _COUNT_MASK, value >> (_TOKEN_BITS + _COUNT_BITS)
            known, right = value & _TOKEN_MASK, value & _TOKEN_MASK == token
            if hits == 1 and not misses:
                self.repeat_rate += _TABLE_RATE * (right - self.repeat_rate)
            hits, misses = (hits + 1, misses) if right else (hits, misses + 1)
            if misses > hits:
                known, hits, misses = token, 1, misses >> 1
            elif hits + misses >= _HALVED_AT:
                hits, misses = hits >> 1, misses >> 1
            value = known | hits << _TOKEN_BITS | misses << (_TOKEN_BITS + _COUNT_BITS)
        if len(self._young) >= _MAX_KEYS:
            self._young, self._old = {}, self._young
        self._young[key] = value

    def predict(self, key: int) -> tuple[int, float]:
        """What follows `key`, and the probability that it does; 0 where nothing is known."""
        value = self._young.get(key) or self._old.get(key)
        if value is None:
            return 0, 0.0
        again, misses = (value >> _TOKEN_BITS & _COUNT_MASK) - 1, value >> (_TOKEN_BITS + _COUNT_BITS)
        return value & _TOKEN_MASK, (again + self.repeat_rate) / (again + misses + 1)


class PerKeyTables:
    """The tables of the cache salts seen last. Timing shows what was guessed, so answers of one salt are never guessed
    from another's."""

    def __init__(self) -> None:
        self._tables: OrderedDict[str, NgramTable] = OrderedDict()

    def table_for(self, cache_salt: str) -> NgramTable:
        table = self._tables.get(cache_salt)
        if table is None:
            table = self._tables[cache_salt] = NgramTable()
            if len(self._tables) > _MAX_TABLES:
                self._tables.popitem(last=False)
        else:
            self._tables.move_to_end(cache_salt)
        return table


class PromptLookup:
    """Guesses for one sequence. `tokens` is its array, of which the first `prompt_length` are the prompt."""

    __slots__ = ("_after", "_copies", "_copying", "_key", "_known", "_table", "_tokens")

    def __init__(self, tokens: Tokens, prompt_length: int, table: NgramTable) -> None:
        self._tokens, self._table = tokens, table
        self._copying = table.copy_rates.copy()
        self._copies = 0
        self._known = prompt_length
        prompt = tokens[:prompt_length].astype(np.int64)
        keys = prompt[:-3] << 2 * _TOKEN_BITS | prompt[1:-2] << _TOKEN_BITS | prompt[2:-1]
        self._after: dict[int, int] = dict(zip(keys.tolist(), range(_KEY_TOKENS, prompt_length), strict=True))
        """The position after the latest place of every three tokens."""
        self._key = 0
        for token in prompt[-_KEY_TOKENS:].tolist():
            self._key = self._key << _TOKEN_BITS | token

    def observe(self, length: int) -> None:
        """Take in the output up to `length`, and learn how much guesses are worth."""
        key, after, tokens, copying = self._key, self._after, self._tokens, self._copying
        for position in range(self._known, length):
            token = int(tokens[position])
            source = after.get(key)
            if source is None:
                self._copies = 0
            else:
                right = int(tokens[source]) == token
                copying[self._copies] += _OWN_RATE * (right - copying[self._copies])
                self._table.copy_rates[self._copies] += _TABLE_RATE * (right - self._table.copy_rates[self._copies])
                self._copies = int(right)
            after[key] = position
            self._table.record(key, token)
            key = (key << _TOKEN_BITS | token) & _KEY_MASK
        self._key, self._known = key, length

    def propose(self, most: int, least: float) -> tuple[list[int], list[float]]:
        """At most `most` tokens that may follow what was read, and how probable each is together with those before
        it: `least` or more."""
        key, copies, probability = self._key, self._copies, 1.0
        guessed: list[int] = []
        probabilities: list[float] = []
        while len(guessed) < most:
            token, share = self._table.predict(key)
            source = self._after.get(key)
            if source is not None and self._copying[copies] > share:
                token, share = int(self._tokens[source]), self._copying[copies]
            probability *= share
            if probability < least:
                break
            guessed.append(token)
            probabilities.append(probability)
            copies = 1
            key = (key << _TOKEN_BITS | token) & _KEY_MASK
        return guessed, probabilities
