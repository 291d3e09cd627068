"""Guesses of the next tokens, from a sequence's own past and from what the same tenant's answers held."""

import numpy as np
import pytest

from appliance.llamacpp.decode.prompt_lookup import MAX_DRAFT_TOKENS, NgramTable, PerKeyTables, PromptLookup
from appliance.llamacpp.decode.sequence import Sequence
from appliance.llamacpp.decode.speculation import MAX_STEP_GROWTH, SpeculationPlanner
from appliance.llamacpp.engine_protocol import Sampling, SequenceRequest
from appliance.llamacpp.rates import Rates


def drafts_of(prompt: list[int], output: list[int], table: NgramTable | None = None) -> PromptLookup:
    """What has read a prompt and an output."""
    tokens = np.zeros(len(prompt) + len(output) + 32, np.int32)
    tokens[: len(prompt) + len(output)] = prompt + output
    made = PromptLookup(tokens, len(prompt), table if table is not None else NgramTable())
    made.observe(len(prompt) + len(output))
    return made


def guessed(drafts: PromptLookup, most: int, least: float) -> list[int]:
    tokens, probabilities = drafts.propose(most, least)
    assert len(tokens) == len(probabilities) <= most
    assert probabilities == sorted(probabilities, reverse=True)
    return tokens


def test_what_is_being_copied_from_the_prompt_goes_on_as_it_does_there() -> None:
    drafts = drafts_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 50], [2, 3, 4])
    assert guessed(drafts, 3, 0.01) == [5, 6, 7]
    assert guessed(drafts, 2, 0.01) == [5, 6]


def test_a_place_that_was_never_seen_brings_no_guess() -> None:
    assert guessed(drafts_of([1, 2, 3, 4, 5], [9, 9, 8]), 8, 0.01) == []


@pytest.mark.parametrize("length", range(5))
def test_a_prompt_of_any_length_can_be_looked_up(length: int) -> None:
    assert guessed(drafts_of(list(range(length)), []), 4, 0.01) == []


def test_of_several_places_the_latest_is_followed() -> None:
    assert guessed(drafts_of([1, 2, 3, 4, 9, 1, 2, 3, 5, 9], [1, 2, 3]), 1, 0.01) == [5]


def test_guesses_become_shorter_as_they_are_wrong_and_longer_as_they_are_right() -> None:
    text = list(range(100, 160))
    unknown = drafts_of(text, text[3:6])
    right = drafts_of(text, text[:20])
    wrong = drafts_of(
        text, [token for start in range(0, 48, 4) for token in (*text[start : start + 3], 7)] + text[50:53]
    )
    assert len(guessed(wrong, 8, 0.2)) < len(guessed(unknown, 8, 0.2)) < len(guessed(right, 8, 0.2))


def test_what_answers_of_a_cache_salt_repeat_is_guessed_in_the_next_one() -> None:
    table = NgramTable()
    for number in range(5):
        drafts_of([1, 2, 3], [10, 11, 12, 13, 20 + number, 14], table)
    assert guessed(drafts_of([1, 2, 3], [], table), 8, 0.5) == [10, 11, 12, 13]
    token, probability = table.predict(11 << 40 | 12 << 20 | 13)
    assert 20 <= token < 25
    assert probability < 0.5


def test_a_sequel_that_changes_is_learned_anew() -> None:
    table = NgramTable()
    for _ in range(200):
        table.record(7, 1)
    token, probability = table.predict(7)
    assert (token, probability > 0.98) == (1, True)
    for _ in range(80):
        table.record(7, 2)
    token, probability = table.predict(7)
    assert (token, probability > 0.5) == (2, True)


def test_tables_are_bounded_and_the_ones_in_use_stay() -> None:
    table = NgramTable()
    for key in range(100_000):
        table.record(key, 3)
        table.record(-1, 4)
    assert table.predict(-1)[0] == 4
    assert table.predict(99_999)[0] == 3
    assert table.predict(5) == (0, 0.0)


def test_a_cache_salt_learns_nothing_of_another_and_the_oldest_is_forgotten() -> None:
    tenants = PerKeyTables()
    first = tenants.table_for("a")
    first.record(1, 2)
    assert tenants.table_for("b").predict(1) == (0, 0.0)
    assert tenants.table_for("a") is first
    for number in range(100):
        tenants.table_for(str(number))
    assert tenants.table_for("a") is not first


# How far a step drafts.


def copying(number: int, *, max_tokens: int = 40, sampling: Sampling | None = None) -> Sequence:
    """A sequence in the middle of copying its prompt."""
    prompt = list(range(100, 160))
    request = SequenceRequest(prompt, max_tokens, sampling or Sampling(temperature=0.0))
    made = Sequence.from_request(request, number, 4_096, frozenset())
    for token in prompt[:20]:
        made.tokens[made.length] = token
        made.length += 1
    return made


def drafting(row_seconds: float, fixed_seconds: float) -> SpeculationPlanner:
    rates = Rates(32)
    rates.observe_prefill(1_000, 1_000 * row_seconds)
    for sequences in rates.buckets:
        rates.observe_decode(sequences, fixed_seconds + sequences * row_seconds)
    return SpeculationPlanner(rates)


def drafted(plan: SpeculationPlanner, count: int, room: int = 1_000, *, read: bool = True) -> list[int]:
    crowd = [copying(number) for number in range(count)]
    for _ in range(3):  # the tenant's figures grow with what is read
        plan.plan_drafts(crowd, room, has_readers=read)
    return [len(one.draft) for one in crowd]


def test_drafts_are_long_where_one_sequence_pays_for_reading_all_weights() -> None:
    assert drafted(drafting(0.001, 0.010), 1) == [MAX_DRAFT_TOKENS]


def test_while_a_stream_is_read_drafts_make_no_step_longer_than_stated() -> None:
    plan, most = drafting(0.001, 0.010), MAX_STEP_GROWTH * (0.010 + 8 * 0.001) / 0.001
    assert 0 < sum(drafted(plan, 8)) <= most < sum(drafted(plan, 8, read=False))


def test_nothing_is_drafted_where_a_row_costs_what_a_step_does() -> None:
    assert drafted(drafting(0.010, 0.0), 4) == [0, 0, 0, 0]


@pytest.mark.parametrize(("room", "total"), [(0, 0), (3, 3), (-5, 0)])
def test_drafts_keep_to_the_room_there_is(room: int, total: int) -> None:
    assert sum(drafted(drafting(0.001, 0.010), 4, room)) == total


def test_where_room_is_short_the_likeliest_guesses_get_it() -> None:
    lengths = drafted(drafting(0.001, 0.010), 4, 9)
    assert sum(lengths) == 9
    assert max(lengths) - min(lengths) <= 3


@pytest.mark.parametrize(("max_tokens", "most"), [(21, 0), (22, 1), (24, 3)])
def test_a_draft_ends_before_the_last_token_that_may_be_written(max_tokens: int, most: int) -> None:
    plan, one = drafting(0.001, 0.010), copying(0, max_tokens=max_tokens)
    plan.plan_drafts([one], 100, has_readers=True)
    assert len(one.draft) == most
    assert one.tokens[one.length : one.length + most].tolist() == one.draft


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.5, seed=3), Sampling(temperature=0.0, frequency_penalty=0.5)]
)
def test_what_is_drawn_by_chance_or_shuns_repetition_is_not_drafted(sampling: Sampling) -> None:
    plan, one = drafting(0.001, 0.010), copying(0, sampling=sampling)
    plan.plan_drafts([one], 100, has_readers=True)
    assert one.draft == []


def test_a_row_more_costs_what_a_token_of_a_prompt_does_but_no_more_than_the_others() -> None:
    rates = Rates(8)
    assert rates.row_seconds(2) is None
    rates.observe_decode(4, 0.020)
    assert rates.row_seconds(4) is None
    rates.observe_prefill(100, 0.2)
    assert rates.row_seconds(4) == pytest.approx((0.002, 0.005))
    rates.observe_prefill(100, 2.0, weight=1.0)
    assert rates.row_seconds(4) == pytest.approx((0.005, 0.005))


def test_a_step_with_more_rows_than_sequences_corrects_the_last_rate() -> None:
    rates = Rates(8)
    rates.observe_prefill(100, 0.2)
    for sequences in (1, 4, 8):
        rates.observe_decode(sequences, 0.010 + 0.002 * sequences)
    rates.observe_decode(16, 0.010 + 0.002 * 16)
    assert rates.decode_at(8) == pytest.approx(8 / 0.026)
    rates.observe_decode(16, 0.5 * (0.010 + 0.002 * 16))
    assert rates.decode_at(8) == pytest.approx(1.1 * 8 / 0.026)
