"""The response of an extraction, for one text and for several. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from appliance.core import Usage
from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.errors import ApplianceError, RejectedReply
from appliance.tasks.extract import chunks
from appliance.tasks.extract.annotations import Annotations, annotate_object
from appliance.tasks.extract.decode_schema import MAX_STRING_CHARS
from appliance.tasks.extract.extraction import ExtractCall, Extracted
from appliance.tasks.extract.value_spans import iter_strings
from appliance.wire.json_schema import check_value
from appliance.wire.usage import write_usage

Result = Extracted | ApplianceError


def make_extract_payload(results: Sequence[Result], calls: Sequence[ExtractCall]) -> JsonObject:
    """The response for one text. Raises the error of a piece that failed."""
    (found,) = _by_text(results, calls)
    if isinstance(found, ApplianceError):
        raise found
    return {"model": found.model, **_row(found), "usage": write_usage(found.usage)}


def make_texts_payload(results: Sequence[Result], calls: Sequence[ExtractCall]) -> JsonObject:
    """The response for several texts, in order."""
    found = _by_text(results, calls)
    rows = [
        {"index": index, **(one.to_openai() if isinstance(one, ApplianceError) else _row(one))}
        for index, one in enumerate(found)
    ]
    done = [result for result in results if isinstance(result, Extracted)]
    return {
        "model": ", ".join(dict.fromkeys(result.model for result in done)) or None,
        "results": rows,
        "usage": write_usage(sum((result.usage for result in done), Usage())),
    }


def _row(found: Extracted) -> JsonObject:
    row: MutableJsonObject = {"object": found.object, "confidence": found.confidences}
    if found.evidence is not None:
        row["evidence"] = {place: {"start": start, "end": end} for place, (start, end) in found.evidence.items()}
    if found.cut:
        row["cut"] = found.cut
    return {**row, **found.extra_fields}


def _by_text(results: Sequence[Result], calls: Sequence[ExtractCall]) -> list[Result]:
    pairs = zip(calls, results, strict=True)
    return [_of_text(list(group)) for _, group in groupby(pairs, key=lambda pair: pair[0].index)]


def _of_text(pairs: Sequence[tuple[ExtractCall, Result]]) -> Result:
    """The object of one text. Where one of its pieces failed the text did: a half may lack what counts."""
    done: list[tuple[ExtractCall, Extracted]] = []
    for call, result in pairs:
        if isinstance(result, ApplianceError):
            return result
        done.append((call, result))
    if len(done) == 1:
        call, found = done[0]
        return found if call.annotations is None else _with_more(found, call.annotations, lambda pointer: call.piece)
    merged = chunks.merge_chunks([chunks.TextChunk(call.span, found.object, found.confidences) for call, found in done])
    try:
        check_value(done[0][0].schema, merged.object)
    except RejectedReply as error:
        return RejectedReply(f"what the text's {len(done)} pieces gave cannot be put together: {error.message}")
    models = dict.fromkeys(found.model for _, found in done)
    usage = sum((found.usage for _, found in done), Usage())
    places = {place for place, text in iter_strings(merged.object) if len(text) == MAX_STRING_CHARS}
    cut = tuple(sorted(places)) if any(found.cut for _, found in done) else ()
    whole = Extracted(merged.object, merged.confidence, ", ".join(models), usage, cut, merged.evidence)
    pieces = {call.span: call.piece for call, _ in done}
    annotations = done[0][0].annotations
    if annotations is None:
        return whole
    return _with_more(whole, annotations, lambda pointer: pieces[_source(merged.evidence, pointer)])


def _source(evidence: Mapping[str, chunks.Span], pointer: str) -> chunks.Span:
    """The piece of a value: that of its property, or of the list's item in which it stands."""
    while pointer not in evidence:
        pointer = pointer.rpartition("/")[0]
    return evidence[pointer]


def _with_more(found: Extracted, annotations: Annotations, piece_of: Callable[[str], tuple[int, str]]) -> Extracted:
    changed, more = annotate_object(found.object, annotations, piece_of)
    return replace(found, object=changed, extra_fields=more)
