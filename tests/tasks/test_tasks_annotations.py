"""Evidence and normalised values of extracted objects."""

import math
from typing import Any

import orjson
import pytest

from appliance.config import EscalationRule
from appliance.router.attempts.verify import find_doubt
from appliance.tasks.extract import extraction
from appliance.tasks.extract.evidence import find_evidence
from appliance.tasks.extract.extract_payload import make_extract_payload
from tests.tasks.rows import LOCAL, chat_payload, refusal, reply

RECEIPT = "OLIVE9  PHARMACY\nSDN BHD\nDATE: 31/03/2017\nTOTAL RM 1,012.15\n2 items, settled"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "company": {"type": "string"},
        "date": {"type": "string", "format": "date"},
        "total": {"type": "number", "x-normalise": "amount"},
        "status": {"enum": ["paid", "open"]},
    },
}


def place_of(value: Any, text: str) -> Any:
    return find_evidence({"v": value}, {}, lambda pointer: (0, text)).places["/v"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("SDN BHD", "SDN BHD"),
        ("Olive9 Pharmacy SDN BHD", "OLIVE9  PHARMACY\nSDN BHD"),
        ("2017-03-31", "31/03/2017"),
        ("31 March 2017", "31/03/2017"),
        (1012.15, "1,012.15"),
        ("1012.15", "1,012.15"),
        (2, "2"),
    ],
)
def test_a_value_is_found_as_written_or_by_what_it_means(value: Any, words: str) -> None:
    start, end = place_of(value, RECEIPT)
    assert RECEIPT[start:end] == words


@pytest.mark.parametrize("value", ["ACME", "01/04/2017", 12.15, 3, "12.15", "PHARM9", "1"])
def test_a_value_that_stands_nowhere_has_no_place(value: Any) -> None:
    assert place_of(value, RECEIPT) is None


def test_places_are_counted_in_characters_whatever_their_bytes() -> None:
    text = "😀 Größe: “Ünïcode” \u2013 5 €"
    start, end = place_of('"Ünïcode" - 5', text)
    assert text[start:end] == "“Ünïcode” \u2013 5"


def test_a_short_value_counts_only_as_a_word_of_its_own() -> None:
    assert place_of("ab", "cabbage") is None and place_of("ab", "c ab b") == (2, 4)
    assert place_of("12", "2012 x") is None


def test_small_numbers_in_words_are_found() -> None:
    assert place_of(2, "a table for two please") == (12, 15)


def answered(body: dict[str, Any], found: dict[str, Any], logprobs: Any = None) -> Any:
    _, (call,) = extraction.read_extract_request({"text": RECEIPT, "schema": SCHEMA, **body})
    content = orjson.dumps(found).decode()
    told = {} if logprobs is None else {"logprobs": logprobs(content)}
    return call.read(LOCAL, [reply(chat_payload(content, **told))]), call


def test_without_being_asked_nothing_more_is_told() -> None:
    plain = {**SCHEMA, "properties": {"company": {"type": "string"}}}
    result, call = answered({"schema": plain}, {"company": "ACME"})
    assert set(make_extract_payload([result], [call])) == {"model", "object", "confidence", "usage"}


def test_normalised_values_stand_in_the_object_and_what_was_written_beside_it() -> None:
    found = {"company": "OLIVE9", "date": "31/03/2017", "total": "1,012.15"}
    told = make_extract_payload(*[[one] for one in answered({"normalise": True, "evidence": True}, found)])
    assert told["object"] == {"company": "OLIVE9", "date": "2017-03-31", "total": 1012.15}
    assert told["normalised"]["/date"] == {"kind": "date", "raw": "31/03/2017", "value": "2017-03-31"}
    assert told["normalised"]["/total"]["currency"] == "MYR"
    place = told["evidence"]["/total"]
    assert RECEIPT[place["start"] : place["end"]] == "1,012.15" and told["not_in_text"] == []


def test_what_cannot_be_told_is_null_with_its_reason() -> None:
    told = make_extract_payload(*[[one] for one in answered({"normalise": True}, {"date": "03/04/2017"})])
    assert told["object"]["date"] is None and "or 2017-04-03" in told["normalised"]["/date"]["reason"]
    told = make_extract_payload(
        *[[one] for one in answered({"normalise": {"locale": "en-GB"}}, {"date": "03/04/2017"})]
    )
    assert told["object"]["date"] == "2017-04-03"


def test_an_invented_value_is_marked_and_makes_the_answer_unsure() -> None:
    def sure(content: str) -> dict[str, Any]:
        return {"content": [{"token": content, "logprob": math.log(0.9), "bytes": list(content.encode())}]}

    result, call = answered({"evidence": True}, {"company": "ACME", "status": "paid"}, sure)
    told = make_extract_payload([result], [call])
    assert told["evidence"] == {"/company": None, "/status": None} and told["not_in_text"] == ["/company"]
    assert told["confidence"] == {"/company": 0.0, "/status": pytest.approx(0.9)}
    rule = EscalationRule(below_confidence=0.5, max_rate=1.0, to=("hosted",))
    assert find_doubt(result, rule) == "confidence 0.00 is below 0.50"
    unknown, _ = answered({"evidence": True}, {"company": "ACME"})
    assert find_doubt(unknown, rule) is not None  # even of a target that tells no probabilities


def test_places_in_a_long_text_are_those_of_the_whole() -> None:
    filler = "Nothing is said here. " * 120
    text = f"{filler}Invoice A-17 of Zoë Ltd.\n\n{filler}Paid by Müller.\n\n{filler}"
    schema = {"type": "object", "properties": {"names": {"type": "array", "items": {"type": "string"}}}}
    body = {"text": text, "schema": schema, "chunk_tokens": 400, "evidence": True}
    _, calls = extraction.read_extract_request(body)
    assert len(calls) > 3
    results = []
    for call in calls:
        names = [name for name in ("Zoë Ltd", "müller") if name.casefold() in call.text.casefold()]
        results.append(call.read(LOCAL, [reply(chat_payload(orjson.dumps({"names": names}).decode()))]))
    told = make_extract_payload(results, calls)
    assert told["object"] == {"names": ["Zoë Ltd", "müller"]}
    words = [text[place["start"] : place["end"]] for place in told["evidence"].values()]
    assert words == ["Zoë Ltd", "Müller"]


def test_examples_are_answered_turns_before_the_text() -> None:
    _, (call,) = extraction.read_extract_request(
        {"text": "x", "schema": SCHEMA, "examples": [{"text": "ACME 5", "object": {"company": "ACME"}}]}
    )
    system, asked, answer, last = call.outgoing(LOCAL)[0].body["messages"]
    assert (system["role"], asked["role"], answer["role"]) == ("system", "user", "assistant")
    assert asked["content"].startswith("ACME 5\n\n") and answer["content"] == '{"company":"ACME"}'
    assert asked["content"][6:] == last["content"][1:]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"examples": [{"text": "x"}]}, "examples[0].object"),
        ({"examples": [{"text": "x", "object": {"company": 5}}]}, "examples[0].object"),
        ({"examples": [{"text": "", "object": {}}]}, "examples[0].text"),
        ({"examples": [{"text": "x", "object": {}, "y": 1}]}, "examples[0]"),
        ({"examples": []}, "examples"),
        ({"evidence": "yes"}, "evidence"),
        ({"normalise": 1}, "normalise"),
    ],
)
def test_wrong_wishes_are_refused_by_name(change: dict[str, Any], param: str) -> None:
    assert refusal(extraction.read_extract_request, {"text": "x", "schema": SCHEMA, **change}).param == param
