"""Prediction, breaker, cost, verification: pure, so plain tables."""

from typing import Any

import pytest

from appliance.config import CostSettings
from appliance.core import Price, UpstreamCall, UpstreamReply, Usage
from appliance.engines.rates import interpolate_decode_rate
from appliance.errors import BackendGarbage, RejectedReply
from appliance.router.attempts.verify import read_verified_reply
from appliance.router.capacity.breaker import CLOSED, Breaker, Breakers, after_failure, after_nothing, after_start
from appliance.router.capacity.predictor import STALE_SECONDS, InFlight, Prediction, predict_latency
from appliance.router.cost import estimate_onsite_usd, hosted_cost_usd, usd_per_busy_second, worst_case_usd
from appliance.router.stats.estimators import TokenEstimateCorrection
from tests.router.scene import PRICE, ChatCall, engine_target, make_request_load, view_of

NOW = 100.0
IDLE = view_of(seen=NOW)


def predicted(view: Any = IDLE, inflight: InFlight | None = None, prompt: int = 100, output: int = 50) -> Prediction:
    return predict_latency(view, inflight or InFlight(), prompt_tokens=prompt, output_tokens=output, now=NOW)


def test_an_idle_engine_begins_after_its_prefill_and_ends_after_its_decode() -> None:
    made = predicted()
    assert made.ready and made.fits_kv and made.can_enter
    assert made.first_byte_seconds == pytest.approx(0.1)
    assert made.finish_seconds == pytest.approx(0.1 + 50 / 100)


def test_what_we_have_sent_and_what_waits_here_comes_first() -> None:
    alone = predicted().first_byte_seconds
    behind = predicted(inflight=InFlight(sequences=1, prompt_tokens=2000)).first_byte_seconds
    waiting = predicted(inflight=InFlight(waiting=1, waiting_prompt_tokens=2000)).first_byte_seconds
    assert behind > alone + 2.0 and waiting > alone + 1.9


def test_pitfall_9_the_engines_gauges_only_correct_our_own_ledger_upwards() -> None:
    own = InFlight(sequences=2, prompt_tokens=4000, output_tokens=100, kv_tokens=4100)
    lagging = predicted(view_of(seen=NOW, load=make_request_load()), own)
    knowing = predicted(view_of(seen=NOW, load=make_request_load(queued_prompt_tokens=9000)), own)
    assert lagging.first_byte_seconds > 4.0, "a gauge at zero does not make the engine free"
    assert knowing.first_byte_seconds > lagging.first_byte_seconds + 4.0


def test_pitfall_9_a_stale_missing_or_unready_view_is_never_taken_for_a_free_engine() -> None:
    unready = [
        None,
        view_of(seen=NOW - STALE_SECONDS - 0.1),
        view_of(seen=NOW, state="starting"),
        view_of(seen=NOW, state="draining"),
        view_of(seen=NOW, state="failed", reason="exit code 3"),
        view_of(seen=NOW, load=None),
    ]
    for view in unready:
        made = predicted(view)
        assert not made.ready and not made.can_enter and not made.fits_kv and made.reason
    assert "exit code 3" in predicted(unready[4]).reason
    believed = predict_latency(IDLE, InFlight(), prompt_tokens=1, output_tokens=1, now=NOW, not_before=NOW)
    assert not believed.ready, "seen before it failed to answer"


def test_with_all_sequences_taken_somebody_has_to_finish_first() -> None:
    full = InFlight(sequences=4, output_tokens=400, kv_tokens=800)
    made = predicted(inflight=full)
    assert 0.5 < made.first_byte_seconds < 2.5
    longer = predicted(inflight=InFlight(sequences=4, output_tokens=4000, kv_tokens=4400))
    assert longer.first_byte_seconds > made.first_byte_seconds * 3


def test_the_engines_own_queue_is_kept_short() -> None:
    assert predicted(inflight=InFlight(sequences=5)).can_enter
    assert not predicted(inflight=InFlight(sequences=6)).can_enter


def test_a_full_kv_cache_keeps_a_request_out_until_there_is_room() -> None:
    nearly = InFlight(sequences=1, output_tokens=1000, kv_tokens=8000)
    made = predicted(inflight=nearly, prompt=500)
    assert not made.fits_kv and not made.can_enter and "KV" in made.reason
    assert made.first_byte_seconds > predicted(prompt=500).first_byte_seconds
    used = predicted(view_of(seen=NOW, load=make_request_load(kv_used_tokens=8100)))
    assert not used.fits_kv


def test_a_request_that_fills_the_whole_cache_enters_an_empty_engine() -> None:
    assert predicted(prompt=8000, output=4000).can_enter


def test_an_engine_without_measurements_is_taken_for_a_slow_one() -> None:
    unmeasured = make_request_load(prefill_tokens_per_second=0.0, decode_tokens_per_second={})
    made = predicted(view_of(seen=NOW, load=unmeasured))
    assert made.ready and made.first_byte_seconds == pytest.approx(1.0) and made.finish_seconds == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("sequences", "rate"), [(1, 100.0), (2, 150.0), (3, 200.0), (5, 250.0), (7, 300.0), (99, 300.0), (0, 100.0)]
)
def test_decode_rates_are_read_between_the_measured_points(sequences: int, rate: float) -> None:
    assert interpolate_decode_rate({1: 100.0, 3: 200.0, 7: 300.0, 9: 0.0}, sequences) == pytest.approx(rate)


def test_fewer_sequences_than_measured_run_at_the_same_speed_each() -> None:
    assert interpolate_decode_rate({4: 200.0}, 2) == pytest.approx(100.0)


def test_pitfall_11_token_estimates_learn_from_what_targets_report() -> None:
    ratios = TokenEstimateCorrection()
    assert ratios.correct("cloud/big", 1000) == 1200, "careful until something was learned"
    for _ in range(200):
        ratios.learn("cloud/big", 1000, 1300)
    assert ratios.correct("cloud/big", 1000) == pytest.approx(1300, rel=0.01)
    assert ratios.correct("cloud/other", 1000) == 1200, "each target has its own tokenizer"
    assert ratios.at_least("cloud/big", 1000) < 1000 and ratios.at_least("cloud/other", 1000) == 500


def test_odd_reports_teach_little() -> None:
    ratios = TokenEstimateCorrection()
    ratios.learn("a", 5, 500)
    ratios.learn("a", 100, 0)
    assert ratios.correct("a", 100) == 120
    ratios.learn("a", 100, 10**9)
    assert ratios.correct("a", 100) == 600


# --- breaker


def failed(times: int, now: float = NOW, retry_after: float | None = None) -> Breaker:
    breaker = CLOSED
    for _ in range(times):
        breaker = after_failure(breaker, now, retry_after_seconds=retry_after)
    return breaker


def test_a_breaker_opens_after_three_failures_in_a_row() -> None:
    assert failed(2).blocked_until(NOW) is None
    assert failed(3).blocked_until(NOW) == NOW + 5.0
    assert failed(3).blocked_until(NOW + 5.0) is None


def test_a_breaker_opens_at_once_when_asked_to_wait() -> None:
    assert failed(1, retry_after=7.0).blocked_until(NOW) == NOW + 7.0


def test_a_retry_after_of_a_year_is_bounded() -> None:
    assert failed(1, retry_after=31_536_000.0).blocked_until(NOW) == NOW + 300.0


def test_the_cool_down_doubles_up_to_its_bound() -> None:
    waits = [(failed(times).blocked_until(NOW) or NOW) - NOW for times in (3, 4, 5, 30)]
    assert waits == [5.0, 10.0, 20.0, 300.0]


def test_a_half_open_breaker_lets_one_probe_through() -> None:
    later = NOW + 6.0
    probing = after_start(failed(3), later)
    assert probing.blocked_until(later) is not None
    assert after_nothing(probing).blocked_until(later) is None
    assert after_failure(probing, later).blocked_until(later) == later + 10.0
    assert probing.blocked_until(later + 61.0) is None, "a probe that never reports does not block for ever"


def test_a_success_closes_the_breaker() -> None:
    breakers = Breakers()
    for _ in range(5):
        breakers.fail("a", NOW, None)
    assert breakers.blocked_until("a", NOW) is not None
    assert breakers.blocked_until("b", NOW) is None
    breakers.succeed("a")
    assert breakers.get("a") == CLOSED


# --- cost


def test_hosted_cost_is_price_times_reported_tokens() -> None:
    usage = Usage(1000, 500, cached_tokens=400)
    assert hosted_cost_usd(Price(2.0, 8.0, 1.0), usage, 9.0) == pytest.approx((600 * 2 + 400 * 1 + 500 * 8) / 1e6)
    assert hosted_cost_usd(PRICE, usage, 9.0) == pytest.approx((1000 * 2 + 500 * 8) / 1e6)


def test_usage_that_is_not_reported_costs_what_was_reserved() -> None:
    assert hosted_cost_usd(PRICE, Usage(), 0.25) == 0.25


def test_a_reservation_is_the_most_a_call_can_cost() -> None:
    usd = worst_case_usd(Price(2.0, 8.0, 0.1), prompt_tokens=1000, output_tokens=500)
    assert usd == pytest.approx((1200 * 2 + 500 * 8) / 1e6)


def test_local_cost_is_the_energy_of_the_engine_time() -> None:
    view = view_of(seen=NOW)
    usd = estimate_onsite_usd(engine_target(), view, Usage(1000, 100), CostSettings(), 2)
    seconds = 1000 / 1000 + 100 / 100
    assert usd == pytest.approx(seconds * 20 / 1000 * 0.30 / 3600)
    cached = estimate_onsite_usd(engine_target(), view, Usage(1000, 100, cached_tokens=1000), CostSettings(), 2)
    assert cached is not None and usd is not None and cached < usd


def test_a_measured_power_and_the_operators_prices_override_assumptions() -> None:
    cost = CostSettings(usd_per_kwh=0.5, watts_per_busy_core=99.0, hardware_usd_per_hour=0.36)
    per_second = usd_per_busy_second(view_of(seen=NOW, watts=100.0), cost, 2)
    assert per_second == pytest.approx((0.1 * 0.5 + 0.36) / 3600)


def test_a_local_cost_that_nothing_tells_is_unknown_and_not_zero() -> None:
    assert estimate_onsite_usd(engine_target(), None, Usage(10, 10), CostSettings(), 2) is None
    priced = engine_target("http://127.0.0.1:1/v1", "lan/big", provider="lan", price=Price(1.0, 1.0))
    assert estimate_onsite_usd(priced, None, Usage(10, 10), CostSettings(), 2) == pytest.approx(20 / 1e6)


# --- verify

SCHEMA_BODY = {"response_format": {"type": "json_schema"}}


def verified(payload: Any, body: Any = None, path: str = "/chat/completions") -> Any:
    reply = UpstreamReply(payload, Usage(), 0.1, 0.2)
    return read_verified_reply(ChatCall({}), engine_target(), [UpstreamCall(path, body or {})], [reply])


def test_a_whole_reply_passes() -> None:
    payload = {"choices": [{"finish_reason": "stop"}]}
    assert verified(payload, SCHEMA_BODY).payload is payload
    assert verified({"choices": [{"finish_reason": "length"}]}).payload
    assert verified({"labels": []}, path="/labels").payload


@pytest.mark.parametrize("payload", [{}, {"choices": None}, {"choices": {}}])
def test_a_reply_without_its_fields_is_garbage(payload: Any) -> None:
    with pytest.raises(BackendGarbage):
        verified(payload)


def test_no_choice_and_half_a_json_are_rejected() -> None:
    with pytest.raises(RejectedReply):
        verified({"choices": []})
    with pytest.raises(RejectedReply, match="max_tokens"):
        verified({"choices": [{"finish_reason": "length"}]}, SCHEMA_BODY)
