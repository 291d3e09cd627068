"""Bounds and permits, and that the code has no other way out."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from starlette.datastructures import Headers

from appliance.core import ANYWHERE, ONSITE, ParsedRequest, PersonalKind, PiiScanResult, Residency
from appliance.errors import RequestError, ResidencyRefused
from appliance.router.request_builder import make_request, new_decision_id
from appliance.router.residency import KIND_NAMES, EgressPermitIssuer, resolve_residency
from appliance.upstream.permit_signature import is_signed
from tests.router.scene import EU, caller_of, engine_target, hosted_target, request_of

SOURCE = Path(__file__).parents[2] / "appliance"


@pytest.mark.parametrize(
    ("key", "header", "route", "default", "expected", "words"),
    [
        (ANYWHERE, None, None, "any", "any", ["nothing binds it"]),
        (ONSITE, None, None, "any", "onsite", ["key 'tester'"]),
        (ANYWHERE, ONSITE, None, "any", "onsite", ["header"]),
        (ANYWHERE, None, "onsite", "any", "onsite", ["route 'r'"]),
        (ANYWHERE, None, None, "onsite", "onsite", ["defaults"]),
        (ANYWHERE, None, "any", "onsite", "any", ["nothing binds it"]),
        (ONSITE, ANYWHERE, None, "any", "onsite", ["key 'tester'", "header says any", "stricter wins"]),
        (EU, ONSITE, None, "any", "onsite", ["header", "key 'tester' says region:EU"]),
        (EU, Residency("region", "US"), None, "any", "onsite", ["the only place inside every bound"]),
        (EU, None, None, "any", "region:EU", ["key"]),
    ],
)
def test_the_strictest_bound_wins_and_says_who_set_it(
    key: Residency, header: Residency | None, route: str | None, default: str, expected: str, words: list[str]
) -> None:
    request = request_of(caller=caller_of(residency=key), residency=header)
    bound, reason = resolve_residency(request, route="r", route_residency=route, default=default)
    assert str(bound) == expected
    assert all(word in reason for word in words), reason


@pytest.mark.parametrize(
    ("key", "header", "content", "setting", "expected", "words"),
    [
        (
            ANYWHERE,
            None,
            PiiScanResult(("email", "iban")),
            ONSITE,
            "onsite",
            "onsite by its content (e-mail address, IBAN)",
        ),
        (ANYWHERE, None, PiiScanResult(("email",)), None, "any", "nothing binds it"),
        (ANYWHERE, None, PiiScanResult(), ONSITE, "any", "nothing binds it"),
        (ANYWHERE, None, PiiScanResult(("phone",)), EU, "region:EU", "region:EU by its content (telephone number)"),
        (ANYWHERE, None, None, ONSITE, "onsite", "onsite by its content (not searched)"),
        (
            ANYWHERE,
            None,
            PiiScanResult((), "it took too long"),
            ONSITE,
            "onsite",
            "its content (not searched: it took too long)",
        ),
        (
            EU,
            None,
            PiiScanResult(("phone",)),
            ONSITE,
            "onsite",
            "(telephone number); the stricter wins over: key",
        ),
        (ANYWHERE, ANYWHERE, PiiScanResult(("phone",)), ONSITE, "onsite", "wins over: the request's header says any"),
        (ONSITE, None, None, ONSITE, "onsite", "onsite by key 'tester'"),
        (ONSITE, None, PiiScanResult(("email",)), ONSITE, "onsite", "by key 'tester' and its content (e-mail address)"),
    ],
)
def test_personal_data_binds_and_so_does_what_was_not_searched(
    key: Residency,
    header: Residency | None,
    content: PiiScanResult | None,
    setting: Residency | None,
    expected: str,
    words: str,
) -> None:
    request = request_of(caller=caller_of(residency=key), residency=header, content=content)
    bound, reason = resolve_residency(request, route="r", route_residency=None, default="any", content=setting)
    assert str(bound) == expected
    assert words in reason


def test_every_kind_has_a_name_for_reasons() -> None:
    assert set(KIND_NAMES) == set(get_args(PersonalKind))


def test_a_permit_is_for_one_request_and_one_endpoint() -> None:
    office, request, target = EgressPermitIssuer(), request_of(), hosted_target()
    permit = office.permit(request, target, ANYWHERE)
    assert is_signed(office.key, request.id, target, permit.seal)
    assert not is_signed(office.key, "another", target, permit.seal)
    assert not is_signed(office.key, request.id, hosted_target("http://elsewhere/v1"), permit.seal)
    assert not is_signed(EgressPermitIssuer().key, request.id, target, permit.seal)


@pytest.mark.parametrize(
    ("fields", "bound"),
    [({}, ONSITE), ({"caller": caller_of(residency=ONSITE)}, ANYWHERE), ({"residency": ONSITE}, ANYWHERE), ({}, EU)],
)
def test_a_bound_request_gets_no_permit_even_from_a_decision_that_forgot(
    fields: dict[str, Any], bound: Residency
) -> None:
    with pytest.raises(ResidencyRefused, match="bound to"):
        EgressPermitIssuer().permit(request_of(**fields), hosted_target(), bound)


def test_a_permit_inside_the_region_is_given() -> None:
    assert EgressPermitIssuer().permit(request_of(), hosted_target(region="EU"), EU).target == "cloud/big"
    assert ONSITE.allows(engine_target())


def asked() -> ParsedRequest:
    return ParsedRequest("chat", "auto", {}, "hello")


def made(headers: Mapping[str, str]) -> Any:
    return make_request(asked(), headers=headers, caller=caller_of(), request_id="r", now=1.0, wall=2.0)


def test_headers_become_residency_and_tag() -> None:
    request = made({"x-appliance-residency": "onsite", "x-appliance-tag": "hr/payroll"})
    assert (request.residency, request.tag, request.received, request.received_at) == (ONSITE, "hr/payroll", 1.0, 2.0)
    assert made({}).residency is None and made({}).tag is None


@pytest.mark.parametrize("value", ["", "local", "ONSITE", "region:", "everywhere", "any, onsite", "\x00", "régión"])
def test_an_unknown_residency_is_refused_and_never_read_as_any(value: str) -> None:
    with pytest.raises(RequestError, match="x-appliance-residency"):
        made({"x-appliance-residency": value})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["any", "onsite"], ONSITE),
        (["onsite", "any"], ONSITE),
        (["any", "any"], ANYWHERE),
        (["region:EU", "any"], EU),
        (["region:EU", "region:US"], ONSITE),
    ],
)
def test_of_a_residency_header_sent_twice_the_strictest_counts(values: list[str], expected: Residency) -> None:
    headers = Headers(raw=[(b"x-appliance-residency", value.encode()) for value in values])
    assert made(headers).residency == expected


@pytest.mark.parametrize("name", ["x-appliance-residancy", "X-Appliance-Region", "x_appliance_residency"])
def test_a_header_that_looks_like_ours_and_is_none_is_refused_with_the_right_name(name: str) -> None:
    with pytest.raises(RequestError, match="did you mean x-appliance-residency"):
        made({name: "onsite"})


def test_an_unknown_residency_beside_a_known_one_is_refused() -> None:
    headers = Headers(raw=[(b"x-appliance-residency", b"any"), (b"x-appliance-residency", b"on-site")])
    with pytest.raises(RequestError, match="on-site"):
        made(headers)


@pytest.mark.parametrize("value", ["with space", "x" * 65, "é\n"])
def test_an_odd_tag_is_refused(value: str) -> None:
    with pytest.raises(RequestError, match="x-appliance-tag"):
        made({"x-appliance-tag": value})


def test_decision_ids_sort_by_time_and_do_not_repeat() -> None:
    ids = [new_decision_id(float(second)) for second in range(1000)]
    assert ids == sorted(ids) and len(set(ids)) == 1000
    assert len({new_decision_id(5.0) for _ in range(1000)}) == 1000
    assert len(ids[0]) == 36 and ids[0].startswith("dec_")


def calls_of(*names: str) -> dict[str, set[str]]:
    """Which files of the source call one of `names`."""
    found: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                function = node.func
                name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
                if name in names:
                    found.setdefault(name, set()).add(str(path.relative_to(SOURCE)))
    return found


def test_only_the_residency_decision_makes_permits() -> None:
    assert calls_of("EgressPermit") == {"EgressPermit": {"router/residency.py"}}
    assert calls_of("sign_permit")["sign_permit"] == {"router/residency.py", "upstream/permit_signature.py"}


CLIENTS = ("AsyncClient", "Client", "ClientSession", "AiohttpTransport", "TCPConnector", "UnixConnector", "urlopen")
MAY_OPEN = {"upstream/base.py", "upstream/local.py", "upstream/egress.py"}
EVALUATES = "quality/evaluation/"
"""A caller of nodes, as any other: a command that no part of a node imports."""


def test_only_the_doors_and_the_control_plane_open_connections() -> None:
    """The control plane polls its engines and pulls models; no request's text ever reaches it."""
    for name, paths in calls_of(*CLIENTS).items():
        strangers = {path for path in paths if path not in MAY_OPEN and not path.startswith(("node/", EVALUATES))}
        assert not strangers, f"{name} is made in {strangers}"
    assert calls_of("EgressDoor").keys() <= {"EgressDoor"}


def test_only_commands_import_what_evaluates() -> None:
    for path in SOURCE.rglob("*.py"):
        here = str(path.relative_to(SOURCE))
        if not here.startswith((EVALUATES, "cli/")):
            assert "quality.evaluation" not in path.read_text(), here


def test_only_the_doors_import_a_client_library_in_the_data_plane() -> None:
    for room in ("router", "tasks", "api", "wire"):
        for path in (SOURCE / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {name.partition(".")[0] for name in names} & {"httpx", "aiohttp", "urllib3", "requests"}, (
                    path
                )
