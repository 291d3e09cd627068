"""What a model is: its dimensions, and the memory that follows from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from appliance.catalog.sources import STRICT, EngineKind, Name, Positive, Variant
from appliance.core import Ability
from appliance.errors import UnknownModel

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model: what it is, what it can do, and the dimensions that its memory follows from.

    Of its `layers`, `linear_layers` keep a state of fixed size (Mamba, gated delta nets), `sliding_layers` keep the
    last `sliding_window_tokens`, and all others keep every token.
    """

    __pydantic_config__ = STRICT

    name: Name
    title: str
    family: str
    publisher: str
    licence: str
    """SPDX identifier, or the name of the publisher's own terms."""
    parameters: Positive
    context_tokens: Positive
    layers: Positive
    embedding: Positive
    """Width of the hidden state."""
    heads: Positive
    kv_heads: Positive
    head_dimension: Positive
    vocabulary_tokens: Positive
    abilities: Annotated[tuple[Ability, ...], Field(min_length=1)]
    notes: str
    """What it is good for and what not."""
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)]
    embedded: bool = False
    """The one that `serve` pulls by itself when no other is configured."""
    measuring_only: bool = False
    """Here because package indexes carry it, for measuring machines; never recommended."""
    sliding_layers: Count = 0
    """How many of `layers` keep only the last `sliding_window_tokens`."""
    sliding_window_tokens: Positive | None = None
    quality: Annotated[float, Field(ge=0, le=1)] | None = None
    """How good its answers are, on the scale that the operator uses for hosted models too; None: it is not declared."""
    template: str | None = None
    """A chat template that replaces the one in the model's own files."""
    architecture: str | None = None
    """The class that its config.json names, where an engine's abilities depend on it."""
    active_parameters: Positive | None = None
    """Of a mixture of experts: what one token is computed with. None: all."""
    linear_layers: Count = 0
    """How many of `layers` keep a state of fixed size instead of keys and values."""
    state_bytes: Count = 0
    """What one sequence keeps in all `linear_layers` together, whatever its length."""
    latent_elements: Positive | None = None
    """Numbers that a layer with latent attention (MLA) keeps of one token in place of keys and values. They cannot be
    split between devices."""
    global_kv_heads: Positive | None = None
    """KV heads of the layers that keep every token, where they differ from the sliding ones."""
    global_head_dimension: Positive | None = None
    settings: Mapping[EngineKind, Mapping[str, str]] = field(default_factory=dict)
    """Options that an engine needs for this model, by engine, as its command line takes them. An empty value stands for
    an option without one."""

    @property
    def full_layers(self) -> int:
        """Layers that keep every token."""
        return self.layers - self.sliding_layers - self.linear_layers

    @property
    def kv_elements_per_token_per_layer(self) -> int:
        """Numbers that one layer remembers of one token: a key and a value per KV head, or a latent vector."""
        return self._elements(full=False, tensor_parallel=1)

    def kv_bytes(
        self,
        context_tokens: int,
        element_bytes: float = 2.0,
        *,
        tensor_parallel: int = 1,
        in_flight_tokens: int = 0,
    ) -> int:
        """Bytes that one sequence of `context_tokens` keeps on each of `tensor_parallel` devices.

        `element_bytes` is 2 for f16 and bf16. A sliding layer may hold `in_flight_tokens` beyond its window: those of
        the step that is being computed. KV heads that are fewer than the devices are kept on several of them.
        """
        window = context_tokens
        if self.sliding_window_tokens is not None:
            window = min(context_tokens, self.sliding_window_tokens + in_flight_tokens)
        full = self.full_layers * context_tokens * self._elements(full=True, tensor_parallel=tensor_parallel)
        sliding = self.sliding_layers * window * self._elements(full=False, tensor_parallel=tensor_parallel)
        return int((full + sliding) * element_bytes) + -(-self.state_bytes // tensor_parallel)

    def _elements(self, *, full: bool, tensor_parallel: int) -> int:
        if self.latent_elements is not None:
            return self.latent_elements
        heads, dimension = self.kv_heads, self.head_dimension
        if full:
            heads, dimension = self.global_kv_heads or heads, self.global_head_dimension or dimension
        return 2 * max(1, -(-heads // tensor_parallel)) * dimension

    def get_variant(self, name: str) -> Variant:
        """The variant called `name`; UnknownModel names those there are."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        known = ", ".join(variant.name for variant in self.variants)
        raise UnknownModel(f"model {self.name!r} has no variant {name!r}; it has {known}")

    def list_variants(self, engine: EngineKind) -> tuple[Variant, ...]:
        return tuple(variant for variant in self.variants if variant.engine == engine)
