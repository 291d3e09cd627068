"""The words of the field, as the values that fields may have."""

from typing import Literal

Task = Literal[
    "classification",
    "extraction",
    "summarisation",
    "generation",
    "code",
    "reasoning",
    "translation",
    "chat",
    "tool_use",
]
Format = Literal["text", "json_object", "json_schema", "labels", "tools"]
LatencyClass = Literal["interactive", "batch"]
Profiler = Literal["rules", "learned", "llm"]
Endpoint = Literal[
    "chat", "completions", "decisions", "extract", "embeddings", "messages", "responses", "generate_content"
]
Location = Literal["onsite", "hosted"]
Dialect = Literal["openai", "anthropic", "gemini"]
Ability = Literal[
    "chat",
    "completions",
    "labels",
    "decisions",
    "json_schema",
    "logprobs",
    "token_logprobs",
    "tools",
    "vision",
    "embeddings",
    "reasoning",
    "classify",
]
KeyHeader = Literal["authorization", "x-api-key", "api-key", "x-goog-api-key"]
TokenLimit = Literal["as_given", "max_tokens", "max_completion_tokens"]
Api = Literal["chat", "responses"]
BatchApi = Literal["openai", "mistral", "anthropic"]
"""How a provider takes many requests at once, to be answered within a day."""
Thinking = Literal["effort", "budget"]
ToolFormat = Literal[
    "hermes",
    "hermes_list",
    "granite",
    "phi4",
    "mistral",
    "mistral_named",
    "llama3",
    "deepseek_v3",
    "deepseek_v31",
    "qwen3_coder",
    "glm",
    "pythonic",
    "lfm2",
    "harmony",
]
"""How a model writes its tool calls; named after the family that is best known for it."""
ReasoningFormat = Literal["think", "mistral_think", "harmony"]
"""How a model marks what it thinks before it answers."""
Scope = Literal["client", "admin"]
EngineState = Literal["starting", "ready", "draining", "failed", "stopped"]
PersonalKind = Literal[
    "email",
    "phone",
    "payment_card",
    "iban",
    "bic",
    "national_id",
    "passport",
    "driver_license",
    "medical_record",
    "date_of_birth",
    "ip_address",
    "mac_address",
    "crypto_wallet",
    "credentials",
    "postal_address",
    "person_name",
]
"""Kinds of personal or secret data that content is searched for."""
Stage = Literal["experimental", "managed", "deprecated"]
"""Life cycle of a route."""
CostBasis = Literal["price", "measured", "configured", "assumed"]
"""How far a cost is known: by a price list, by a meter, by the operator's word, or by nobody."""
Verification = Literal["whole", "stream"]
"""Whether what must be verified is verified before its first byte leaves, or at the end of its stream."""

AttemptCause = Literal["first", "overflow", "fallback", "rejected", "retry", "escalation", "degraded", "provider_batch"]
"""Why a target was asked. `first`: the route's own order put it there. `overflow`: a better one was full or not up.
`fallback`: another one failed, or its route falls back on this one. `rejected`: another one's answer did not pass.
`retry`: the same target again. `escalation`: an answer was unsure, or is audited. `degraded`: the request was made
smaller. `provider_batch`: asked in a batch of its provider."""
AttemptResult = Literal["answered", "overflowed", "failed", "rejected", "refused", "cancelled"]
