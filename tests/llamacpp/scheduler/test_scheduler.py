"""What goes into the next step, as tables; and how the measured rates are kept."""

import pytest

from appliance.llamacpp.decode.sequence import Sequence
from appliance.llamacpp.engine_protocol import SequenceRequest
from appliance.llamacpp.fair_queue import FairQueue
from appliance.llamacpp.kv.capacity import BatchCapacity
from appliance.llamacpp.rates import Rates
from appliance.llamacpp.scheduler.scheduler import (
    OUTPUT_RESERVE_TOKENS,
    SLOW_STEP_TOKENS,
    WORTH_WAITING_TOKENS,
    WaitQueue,
    allot_prompt_tokens,
    choose_preempted,
    choose_victim,
    computes_shared_prefix,
    count_charged_tokens,
    count_promised_tokens,
    is_worth_a_slot,
    limit_cached_tokens,
    plan_prefill_chunks,
    plan_step_tokens,
)


def sequence(
    number: int, prompt: int = 100, *, priority: int = 0, computed: int = 0, max_tokens: int = 1000, salt: str = ""
) -> Sequence:
    request = SequenceRequest(list(range(prompt)), max_tokens, priority=priority, cache_salt=salt)
    made = Sequence.from_request(request, number, 4096, frozenset())
    made.computed = computed
    return made


def test_the_line_goes_by_priority_and_then_by_arrival() -> None:
    line = WaitQueue()
    for number, priority in ((0, 1), (1, 0), (3, 0), (2, 0)):
        line.push(sequence(number, priority=priority))
    assert [waiting.number for waiting in line.list_in_order()] == [1, 2, 3, 0]
    line.remove(line.list_in_order()[1])
    assert [waiting.number for waiting in line.list_in_order()] == [1, 3, 0]


def test_one_that_was_put_back_returns_to_its_old_place() -> None:
    line = WaitQueue()
    early = sequence(0)
    line.push(sequence(5))
    line.push(early)
    assert line.list_in_order()[0] is early


@pytest.mark.parametrize(
    ("used", "promised", "tokens", "fits"), [(0, 0, 100, True), (50, 40, 10, True), (50, 40, 11, False)]
)
def test_room_counts_what_is_used_and_what_is_promised(used: int, promised: int, tokens: int, fits: bool) -> None:
    assert BatchCapacity(100, used, promised).fits(tokens) is fits


def test_a_sequence_is_promised_its_prompt_and_the_first_part_of_its_output() -> None:
    assert count_promised_tokens(sequence(0, 100)) == 100 + OUTPUT_RESERVE_TOKENS
    assert count_promised_tokens(sequence(0, 100, computed=90, max_tokens=5)) == 15


def test_the_end_of_the_context_limits_the_output() -> None:
    assert sequence(0, 4000, max_tokens=1000).remaining == 96


@pytest.mark.parametrize(
    ("batch", "decoding", "readers", "rate", "budget"),
    [
        (512, 0, 0, 2000.0, 512),
        (512, 8, 0, 2000.0, 512),  # those who get their answers whole notice no pause
        (512, 8, 1, 2000.0, 256),
        (512, 8, 8, 2000.0, 256),
        (512, 0, 8, 2000.0, 256),
        (512, 8, 8, 20000.0, 512),
        (512, 8, 8, 400.0, 64),
        (512, 40, 40, 400.0, 128),
        (512, 8, 8, 50.0, 8 + SLOW_STEP_TOKENS),
        (512, 8, 8, 0.0, 64),
        (512, 0, 8, 0.0, 64),
        (32, 32, 32, 50.0, 33),
        (32, 32, 0, 50.0, 33),
    ],
)
def test_a_step_is_short_while_somebody_reads_a_stream(
    batch: int, decoding: int, readers: int, rate: float, budget: int
) -> None:
    assert plan_step_tokens(batch, decoding, readers, rate, 0.15) == budget


@pytest.mark.parametrize(
    ("prompts", "prompt_priority", "labels", "label_priority", "given"),
    [
        (500, 0, 0, None, 100),
        (500, 0, 1000, 0, 50),
        (20, 0, 1000, 0, 20),
        (500, 0, 30, 0, 70),
        (500, 0, 1000, 1, 100),
        (500, 1, 1000, 0, 0),
        (500, 1, 30, 0, 70),
    ],
)
def test_prompts_and_labels_share_a_step_unless_one_is_more_urgent(
    prompts: int, prompt_priority: int, labels: int, label_priority: int | None, given: int
) -> None:
    assert allot_prompt_tokens(100, prompts, prompt_priority, labels, label_priority) == given


def test_unused_prefixes_give_way_where_work_waits() -> None:
    assert [limit_cached_tokens(16_384, crowded) for crowded in (False, True)] == [8_192, 2_048]
    assert limit_cached_tokens(512, True) == 256


def test_prompts_are_computed_in_order_of_rank_and_cut_at_the_budget() -> None:
    late, urgent, early = sequence(2, 100), sequence(3, 100, priority=-1), sequence(1, 100, computed=60)
    assert plan_prefill_chunks([late, urgent, early], 150, 8) == [(urgent, 100), (early, 40), (late, 10)]
    assert plan_prefill_chunks([late, urgent, early], 150, 1) == [(urgent, 100)]
    assert plan_prefill_chunks([late], 0, 8) == []


def test_tenants_take_turns_in_the_line_and_one_that_was_put_back_keeps_its_own() -> None:
    line, turns = WaitQueue(), FairQueue()
    for number, salt in enumerate(["a", "a", "a", "b", "c", "b"]):
        waiting = sequence(number, salt=salt)
        waiting.start_tag = turns.assign_start_tag(salt, count_charged_tokens(waiting))
        line.push(waiting)
    order = [waiting.number for waiting in line.list_in_order()]
    assert order == [0, 3, 4, 1, 5, 2]
    first = line.list_in_order()[0]
    line.remove(first)
    turns.advance(first.start_tag, count_charged_tokens(first))
    line.push(first)
    assert line.list_in_order()[0] is first


@pytest.mark.parametrize(
    ("computed", "max_tokens", "slot", "running", "worth"),
    [
        (99, 1000, 512, 2, True),
        (99, 1000, 512, 1, False),
        (98, 1000, 512, 2, False),
        (99, 1000, 163, 2, False),
        (99, 1000, 164, 2, True),
        (99, 5, 512, 2, False),
        (99, 1000, 0, 2, False),
    ],
)
def test_a_sequence_moves_to_a_slot_when_it_generates_and_the_slot_has_room_to_grow(
    computed: int, max_tokens: int, slot: int, running: int, worth: bool
) -> None:
    assert is_worth_a_slot(sequence(0, 100, computed=computed, max_tokens=max_tokens), slot, running) is worth


def test_a_sequence_in_a_slot_counts_on_no_shared_cells() -> None:
    slotted = sequence(0, 100, computed=99)
    slotted.slot = 0
    assert (count_promised_tokens(slotted), slotted.private_cells, slotted.running) == (0, 0, True)


def test_only_the_less_urgent_give_way_to_one_that_waits() -> None:
    batch, later, peer = sequence(1, priority=5), sequence(2, priority=5), sequence(3)
    assert choose_preempted([batch, later, peer], sequence(9)) is later
    assert choose_preempted([peer], sequence(9)) is None
    assert choose_preempted([], sequence(9)) is None


def test_the_youngest_of_the_least_urgent_gives_way() -> None:
    old, young, batch = sequence(1), sequence(9), sequence(3, priority=5)
    assert choose_victim([old, young]) is young
    assert choose_victim([old, batch, young]) is batch


@pytest.mark.parametrize(
    ("leader", "cached", "waits"),
    [
        (sequence(0, 100), 0, True),
        (sequence(0, 100), 99 - WORTH_WAITING_TOKENS, True),
        (sequence(0, 100), 100 - WORTH_WAITING_TOKENS, False),
        (sequence(0, 100, computed=99), 0, False),
        (sequence(0, 100, salt="other"), 0, False),
        (sequence(0, WORTH_WAITING_TOKENS - 1), 0, False),
    ],
)
def test_a_prompt_waits_for_another_that_computes_the_same(leader: Sequence, cached: int, waits: bool) -> None:
    assert computes_shared_prefix(leader, sequence(1, 100), cached) is waits


def test_a_rate_that_nobody_measured_is_unknown() -> None:
    rates = Rates(8)
    assert (rates.prefill_tokens_per_second, dict(rates.decode_tokens_per_second), rates.decode_at(3)) == (0, {}, 0)
    assert rates.seconds_for(10, 0, 1) is None
    assert rates.seconds_for(0, 0, 1) == 0


def test_rates_follow_what_is_seen_slowly() -> None:
    rates = Rates(8)
    rates.observe_prefill(100, 1.0)
    rates.observe_prefill(200, 1.0)
    assert rates.prefill_tokens_per_second == pytest.approx(110)
    rates.observe_decode(4, 0.1)
    assert dict(rates.decode_tokens_per_second) == {4: pytest.approx(40)}


def test_decode_rates_lie_on_lines_between_the_measured_ones() -> None:
    rates = Rates(16)
    for sequences, seconds in ((1, 0.1), (4, 0.2), (8, 0.2)):
        rates.observe_decode(sequences, seconds)
    assert [rates.decode_at(n) for n in (1, 2, 4, 6, 8, 16)] == pytest.approx([10, 40 / 3, 20, 30, 40, 40])


def test_a_step_between_two_measured_numbers_corrects_the_nearer_by_its_ratio() -> None:
    rates = Rates(8)
    rates.observe_decode(4, 0.2)
    rates.observe_decode(8, 0.2)
    rates.observe_decode(5, 5 / 50.0)  # twice the 25 that was expected
    assert rates.decode_tokens_per_second[4] == pytest.approx(22)


def test_the_time_for_known_work_is_the_sum_of_both_kinds() -> None:
    rates = Rates(4)
    rates.observe_prefill(100, 1.0)
    rates.observe_decode(4, 0.1)
    assert rates.seconds_for(200, 80, 4) == pytest.approx(4.0)
