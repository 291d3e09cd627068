"""Constrained decoding: a JSON schema becomes a mask over the next token, by llguidance."""

import ctypes
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt
import orjson
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from appliance.core.json_types import JsonObject, JsonSchema
from appliance.errors import ApplianceError, EngineBusy, RequestError
from appliance.llamacpp.binding import lib
from appliance.llamacpp.engine_protocol import Logits
from appliance.llamacpp.memory_release import release_freed
from appliance.llamacpp.tools.grammar import ReplyGrammarSpec, write_grammar

JSON_OBJECT: JsonSchema = {"type": "object"}

# Small models fill the gaps of flexible JSON with spaces until their budget is gone; a schema may still ask for
# whitespace by its own `x-guidance`.
COMPACT: JsonObject = {"whitespace_flexible": False}

MAX_CACHED_GRAMMARS = 64
_FORMAT = "response_format"
# A schema may come from a stranger. The default grammar limit (500,000) lets one compile for seconds.
MAX_GRAMMAR_SIZE = 100_000


_SPECIAL = b"\xff"
"""Begins what llguidance shall not take for text: no piece of text has this byte."""
_LONGEST_PIECE_BYTES = 16_384
_SLICES = (r'[^"\\\x00-\x1F\x7F]{1,10}', r'[^"\\\x00-\x1F\x7F]{1,30}')
"""Tokens that a JSON string may go on with: their masks are made beforehand, in 3 MB a set at 49,152 tokens. Of
llguidance's own four sets these two do all the good: a mask takes 57 us with four or two, and 117 us with none."""
_FEW_WORDS = 256
"""Of the mask's words of 32 tokens. Where fewer have a forbidden token, those are forbidden one by one."""


class ConstraintBroken(ApplianceError):
    """The grammar hit a limit while decoding, so what would follow could not be held to the schema."""

    code = "constraint_failed"


class JsonConstraint:
    """One sequence's place in a grammar; see `params.Constraint`."""

    def __init__(self, matcher: LLMatcher, vocabulary_size: int) -> None:
        self._matcher = matcher
        self._words = np.zeros((vocabulary_size + 31) // 32, dtype=np.int32)
        self._address = self._words.ctypes.data

    def apply(self, logits: Logits) -> None:
        """Shape (vocabulary,), in place. Raises ConstraintBroken when the grammar ran into a limit."""
        self._matcher.unsafe_compute_mask_ptr(self._address, self._words.nbytes)
        if self._matcher.is_error():
            raise ConstraintBroken(f"the JSON schema could not be followed further: {self._reason()}; simplify it")
        open_words = np.flatnonzero(self._words != -1)
        if len(open_words) < _FEW_WORDS:
            self._forbid_few(logits, open_words)
            return
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little")[: logits.size]
        # Measured at 49,152 tokens: with few allowed tokens gathering costs 10 us against 18 us, with many a masked
        # copy costs 7 us against 78 us.
        if int(np.bitwise_count(self._words).sum()) < logits.size // 8:
            allowed = np.flatnonzero(bits)
            kept = logits[allowed]
            logits.fill(-np.inf)
            logits[allowed] = kept
        else:
            np.copyto(logits, -np.inf, where=bits == 0)

    def _forbid_few(self, logits: Logits, words: npt.NDArray[np.intp]) -> None:
        """Free text forbids little more than control tokens: only the mask's words that name them are looked at.

        Measured at 151,936 tokens: 20 us a token in place of 420.
        """
        bits = np.unpackbits(self._words[words].view(np.uint8), bitorder="little").reshape(-1, 32)
        rows, columns = np.nonzero(bits == 0)
        tokens = words[rows] * 32 + columns
        logits[tokens[tokens < logits.size]] = -np.inf

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise ConstraintBroken(f"token {token} does not fit the JSON schema: {self._reason()}")

    def list_forced_tokens(self) -> list[int]:
        """What the schema leaves no choice about: keys, and the signs between them. Computed together in one step."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        return tokens

    def count_allowed(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` fit the schema one after the other: 1 us each."""
        count: int = self._matcher.try_consume_tokens(tokens)
        if count:
            self._matcher.rollback(count)
        return count

    def finished(self) -> bool:
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def _reason(self) -> str:
        return _first_line(self._matcher.get_error())


class GrammarCompiler:
    """Compiles schemas against one vocabulary and remembers the latest. Safe to call from several threads.

    The tokenizer's own tables take 0.2 s and 12 MB for 49,000 tokens. They are built once, when the first schema comes.
    """

    def __init__(
        self,
        vocab_pointer: ctypes.c_void_p,
        end_tokens: Collection[int],
        *,
        vocabulary_size: int,
        max_cached: int = MAX_CACHED_GRAMMARS,
    ) -> None:
        self._vocab_pointer: ctypes.c_void_p | None = vocab_pointer
        self._end_tokens = sorted(end_tokens)
        self._tables: LLTokenizer | None = None
        self._vocabulary_size = vocabulary_size
        self._limits = LLParserLimits(max_grammar_size=MAX_GRAMMAR_SIZE)
        self._compiled: OrderedDict[bytes, LLMatcher] = OrderedDict()
        self._max_cached = max_cached
        self._lock, self._tables_lock = threading.Lock(), threading.Lock()

    def compile(self, schema: JsonSchema, *, param: str = _FORMAT) -> JsonConstraint:
        """A fresh constraint for one sequence. Takes milliseconds, or seconds for a huge schema: call it in a thread.

        Raises RequestError with llguidance's own reason when the schema is invalid or uses what cannot be enforced.
        """
        written = orjson.dumps(schema, option=orjson.OPT_NON_STR_KEYS)
        return self._remembered(written, lambda: self._build(schema, param))

    def compile_reply(self, spec: ReplyGrammarSpec) -> JsonConstraint:
        """A fresh constraint for one reply with tool calls or reasoning in it. As slow as `compile`.

        A tool whose schema uses what cannot be enforced gets arguments that are some JSON object, unless it is strict.
        Raises RequestError where it is, or where the schema of the content cannot be enforced.
        """
        grammar = write_grammar(spec, lambda name, schema: self._enforceable(spec, name, schema))
        return self._remembered(grammar.encode(), lambda: self._matcher(grammar, "tools" if spec.offered else _FORMAT))

    @property
    def _tokenizer(self) -> LLTokenizer:
        with self._tables_lock:
            if self._tables is None:
                if self._vocab_pointer is None:
                    raise EngineBusy("the engine is shutting down: try again when it is back", retry_after_seconds=5.0)
                self._tables = _tables(self._vocab_pointer, self._vocabulary_size, self._end_tokens)
                release_freed()
            return self._tables

    def close(self) -> None:
        """The model goes: read its vocabulary no more, and wait until it is not being read."""
        with self._tables_lock:
            self._vocab_pointer = None

    def _remembered(self, written: bytes, build: Callable[[], LLMatcher]) -> JsonConstraint:
        key = hashlib.sha256(written).digest()
        with self._lock:
            matcher = self._compiled.get(key)
            if matcher is not None:
                self._compiled.move_to_end(key)
        if matcher is None:
            matcher = build()
            with self._lock:
                self._compiled[key] = matcher
                while len(self._compiled) > self._max_cached:
                    self._compiled.popitem(last=False)
        return JsonConstraint(matcher.deep_copy(), self._vocabulary_size)

    def _enforceable(self, spec: ReplyGrammarSpec, name: str, schema: JsonSchema) -> JsonSchema:
        try:
            self.compile(schema, param=f"tools: the parameters of {name}")
        except RequestError as error:
            if spec.offered is not None and name in spec.offered.strict:
                raise RequestError(error.message, param="tools") from error
            return JSON_OBJECT
        return schema

    def _build(self, schema: JsonSchema, param: str) -> LLMatcher:
        try:
            grammar = LLMatcher.grammar_from_json_schema(orjson.dumps(schema).decode(), defaults=dict(COMPACT))
        except ValueError as error:
            raise RequestError(f"{param}: the JSON schema cannot be read: {error}", param=param) from error
        return self._matcher(grammar, param)

    def _matcher(self, grammar: str, param: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            reason = _first_line(matcher.get_error())
            raise RequestError(f"{param}: the JSON schema cannot be enforced: {reason}", param=param)
        return matcher


def _tables(vocab_pointer: ctypes.c_void_p, vocabulary_size: int, end_tokens: list[int]) -> LLTokenizer:
    """llguidance's view of llama.cpp's vocabulary."""
    buffer = ctypes.create_string_buffer(_LONGEST_PIECE_BYTES)
    pieces = []
    for token in range(vocabulary_size):
        length = lib.llama_token_to_piece(vocab_pointer, token, buffer, _LONGEST_PIECE_BYTES, 0, True)
        piece = ctypes.string_at(buffer, max(0, length))
        attributes = lib.llama_vocab_get_attr(vocab_pointer, token)
        marker = attributes & lib.LLAMA_TOKEN_ATTR_USER_DEFINED and piece[:1] == b"<" and piece[-1:] == b">"
        pieces.append(_SPECIAL + piece if marker or attributes & lib.LLAMA_TOKEN_ATTR_CONTROL else piece)
    return LLTokenizer.from_llamacpp(
        tokens=pieces,
        vocab_ptr=vocab_pointer,
        tokenize_fptr=ctypes.cast(lib.llama_tokenize, ctypes.c_void_p).value,
        eos_token=end_tokens or lib.llama_vocab_eos(vocab_pointer),
        slices=_SLICES,
    )


def _first_line(report: str) -> str:
    """llguidance's reason without the parser state it appends, which would hold parts of the reply."""
    reason = report.split("<state>")[0].strip()
    return " ".join(reason.split())[:400]
