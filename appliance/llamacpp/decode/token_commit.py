"""What the rows of a step say is written: the next token of a sequence, and more as far as its draft was right.

Every token is chosen by the sampler, in order and from the row that belongs to it, so a draft changes nothing of what
is written: a row counts only where the tokens before it are those it was computed with.
"""

from collections.abc import Sequence as Ordered

from appliance.llamacpp.context import Rows
from appliance.llamacpp.decode.sequence import Sequence
from appliance.llamacpp.engine_protocol import Logits, TokenEvent
from appliance.llamacpp.kv.prefix_cache import count_shared_prefix
from appliance.llamacpp.model import LlamaModel


def commit_tokens(sequence: Sequence, rows: Rows, best: Ordered[int], model: LlamaModel) -> int:
    """Choose the token after the last one and after each of the draft, until the draft says something else or the
    sequence ends; give how many of the draft's tokens came to be. Memory behind them is given back.

    `rows`: logits after the last token and after each of the draft. `best`: their argmax, for plain greedy sequences.
    Everything up to `length` has been computed.
    """
    draft, start, kept = sequence.draft, sequence.length, 0
    sequence.draft = []
    while True:
        sequence.computed = start + kept
        if sequence.sampler.plain_greedy:
            _take(sequence, TokenEvent(best[kept]), model)
        else:
            _choose(sequence, rows[kept], model)
        new = sequence.tokens[start + kept : sequence.length].tolist()
        agreed = count_shared_prefix(new, draft[kept:])
        kept += agreed
        if sequence.finished is not None:
            return kept
        if agreed < len(new):
            break
    sequence.computed = start + kept
    if kept < len(draft):
        model.memory_remove(sequence.id, start + kept)
    return kept


def _choose(sequence: Sequence, row: Logits, model: LlamaModel) -> None:
    try:
        event = sequence.sampler.choose(row)
    except Exception as error:  # a constraint's fault harms its own sequence only
        sequence.finish("error", f"the next token cannot be chosen: {error}")
        return
    _take(sequence, event, model)


def _take(sequence: Sequence, event: TokenEvent, model: LlamaModel) -> None:
    if event.token in model.end_tokens and not sequence.request.ignore_eos:
        sequence.finish("stop")
        return
    sequence.append(event)
    sampler = sequence.sampler
    if not sampler.stateless:
        try:
            sampler.accept(event.token)
            _append_forced(sequence)
        except Exception as error:
            sequence.finish("error", f"the constraint refuses its own token: {error}")
    if sequence.finished is None and (sampler.finished or not sequence.remaining):
        sequence.finish("stop" if sampler.finished else "length")


def _append_forced(sequence: Sequence) -> None:
    """Tokens without a choice are computed with the next one, as a piece of prompt is.

    Not in a slot: there each rides along with the other slots' tokens, and a run would be a pass of its own.
    """
    if sequence.slot >= 0:
        return
    for event in sequence.sampler.list_forced_events()[: sequence.remaining]:
        sequence.append(event)
        sequence.sampler.accept(event.token)
