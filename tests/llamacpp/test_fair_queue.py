"""Turns among tenants, as arithmetic."""

from appliance.llamacpp.fair_queue import FairQueue


def served(turns: FairQueue, waiting: list[tuple[str, int]]) -> list[str]:
    """The tenants of `waiting` work in the order in which it is begun."""
    places = [
        (turns.assign_start_tag(tenant, tokens), number, tenant) for number, (tenant, tokens) in enumerate(waiting)
    ]
    for place, number, _ in sorted(places):
        turns.advance(place, waiting[number][1])
    return [tenant for _, _, tenant in sorted(places)]


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    turns = FairQueue()
    places = [turns.assign_start_tag("a", 10) for _ in range(5)]
    assert places == sorted(places)


def test_a_single_request_does_not_wait_behind_a_thousand_of_another() -> None:
    assert served(FairQueue(), [("bulk", 100)] * 1000 + [("quick", 100)]).index("quick") == 1


def test_tenants_with_long_requests_get_as_many_tokens_not_as_many_requests() -> None:
    order = served(FairQueue(), [("long", 300)] * 10 + [("short", 100)] * 30)
    assert order[:8].count("short") in (5, 6)


def test_whoever_was_away_gets_no_credit_for_it() -> None:
    turns = FairQueue()
    for _ in range(50):
        turns.advance(turns.assign_start_tag("busy", 100), 100)
    late = [turns.assign_start_tag("new", 100) for _ in range(3)]
    assert late[0] <= turns.assign_start_tag("busy", 100) < late[2]


def test_a_stream_of_new_tenants_starves_nobody() -> None:
    turns = FairQueue()
    turns.advance(turns.assign_start_tag("old", 100), 100)
    back = turns.assign_start_tag("old", 100)
    others = [turns.assign_start_tag(f"new {number}", 100) for number in range(3)]
    for number in range(50):
        turns.advance(others[-3], 100)
        others.append(turns.assign_start_tag(f"later {number}", 100))
    assert sum(place < back for place in others) < 10


def test_tenants_of_the_past_are_forgotten() -> None:
    turns = FairQueue()
    for number in range(5_000):
        turns.advance(turns.assign_start_tag(str(number), 1), 1)
    assert len(turns._ends) < 1_000
