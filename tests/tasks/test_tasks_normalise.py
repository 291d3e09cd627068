"""One form for dates, amounts and terms: what is read, and what is said instead of guessed."""

from decimal import Decimal
from typing import Any

import pytest

from appliance.errors import RequestError
from appliance.tasks.extract.normalise.amounts import find_currency_near, read_amount
from appliance.tasks.extract.normalise.dates import read_date
from appliance.tasks.extract.normalise.field_hints import FieldSpec, find_hint, read_field_specs, strip_hints
from appliance.tasks.extract.normalise.locale import get_locale, read_locale
from appliance.tasks.extract.normalise.normalised_value import ANY, LocaleRules
from appliance.tasks.extract.normalise.numerals import list_readings
from appliance.tasks.extract.normalise.vocabulary import read_term


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("2017-03-04", "2017-03-04"),
        ("2017/3/4", "2017-03-04"),
        ("20170304", "2017-03-04"),
        ("31/03/2017", "2017-03-31"),
        ("03-31-2017", "2017-03-31"),
        ("04/04/2017", "2017-04-04"),
        ("3.4.2017", "2017-04-03"),
        ("DATE: 31/03/2017 10:30 PM", "2017-03-31"),
        ("12 March 2024", "2024-03-12"),
        ("Monday, August 20, 2018", "2018-08-20"),
        ("August 13th, 2018", "2018-08-13"),
        ("20. Dezember 2018", "2018-12-20"),
        ("1er février 2020", "2020-02-01"),
        ("12 de marzo de 2024", "2024-03-12"),
        ("2024年3月20日", "2024-03-20"),
    ],
)
def test_a_date_that_can_mean_one_day_only_is_that_day(raw: str, value: str) -> None:
    form = read_date(raw, ANY)
    assert (form.value, form.raw, form.reason) == (value, raw, None)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("03/04/2017", "2017-03-04 or 2017-04-03"),
        ("3-4-17", "2017-03-04 or 2017-04-03"),
        ("31/02/2024", "not a day"),
        ("5 May", "no year"),
        ("tonight", "not a date"),
        ("99.99.9999", "not a day"),
        ("", "not a date"),
    ],
)
def test_a_date_that_cannot_be_told_is_none_and_says_why(raw: str, words: str) -> None:
    form = read_date(raw, ANY)
    assert form.value is None
    assert form.reason is not None and words in form.reason


def test_what_is_assumed_of_a_short_year_is_said() -> None:
    form = read_date("31/12/18", ANY)
    assert form.value == "2018-12-31" and form.reason is not None and "century" in form.reason
    assert read_date("31/12/70", ANY).value == "1970-12-31"


def test_customs_settle_the_order() -> None:
    assert read_date("03/04/2017", LocaleRules("DMY")).value == "2017-04-03"
    assert read_date("03/04/2017", get_locale("en-US")).value == "2017-03-04"
    assert read_date("17/04/03", LocaleRules("YMD")).value == "2017-04-03"
    assert read_date("03/04/2017 10:30 PM", LocaleRules("DMY"), "datetime").value == "2017-04-03T22:30:00"
    assert read_date("12 March 2024", ANY, "datetime").reason == "it has no time of day"


@pytest.mark.parametrize(
    ("raw", "value", "currency"),
    [
        ("RM12.15", "12.15", "MYR"),
        ("USD 5.00", "5.00", "USD"),
        ("1.234,50 €", "1234.50", "EUR"),
        ("1,234.50", "1234.50", None),
        ("€ 1\u00a0234,50", "1234.50", "EUR"),
        ("1'234.50 CHF", "1234.50", "CHF"),
        ("1,000,000", "1000000", None),
        ("(12.00)", "-12.00", None),
        ("12.00-", "-12.00", None),
        ("-4.50", "-4.50", None),
        ("0.123", "0.123", None),
    ],
)
def test_an_amount_is_a_decimal_and_a_currency(raw: str, value: str, currency: str | None) -> None:
    form = read_amount(raw, ANY)
    assert (form.value, form.currency, form.reason) == (value, currency, None)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("1,234", "1.234 or 1234"),
        ("12K", "'K'"),
        ("3 x 4", "2 numbers"),
        ("free", "no digits"),
        ("1.2.3", "not a number"),
    ],
)
def test_an_amount_that_cannot_be_told_is_none_and_says_why(raw: str, words: str) -> None:
    form = read_amount(raw, ANY)
    assert form.value is None
    assert form.reason is not None and words in form.reason


def test_a_dollar_may_be_anybodys_until_somebody_says_whose() -> None:
    form = read_amount("$5", ANY)
    assert form.value == "5" and form.currency is None and form.reason is not None and "CAD" in form.reason
    assert read_amount("$5", LocaleRules(currency="CAD")).currency == "CAD"
    assert read_amount("1,234", get_locale("de-DE")).value == "1.234"
    assert read_amount("1,234", get_locale("en-GB")).value == "1234"


def test_a_currency_beside_a_number_in_the_text_is_its_own() -> None:
    text = "SUBTOTAL\nRM 12.15\nTRY 5"
    assert find_currency_near(text, 12, 17) == "MYR"
    assert find_currency_near(text, 22, 23) is None  # a word, too


def test_a_numeral_may_be_read_in_two_ways() -> None:
    assert list_readings("1.234") == {Decimal("1.234"), Decimal(1234)}
    assert list_readings("12.34") == {Decimal("12.34")} and list_readings("0,123") == {Decimal("0.123")}
    assert list_readings("1.2,3.4") == frozenset() and list_readings("9" * 100) == frozenset()


def test_terms_are_found_under_all_their_names() -> None:
    terms = {"paid": ["bezahlt", "settled"], "open": ["due", "not paid"]}
    assert read_term("Settled ", terms).value == "paid"
    assert read_term("NOT-PAID", terms).value == "open"
    assert read_term("lost", terms).reason == "it is none of 'paid', 'open'"
    assert read_term("x", {"a": ["x"], "b": ["X"]}).value is None


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "day": {"type": "string", "format": "date", "description": "of purchase"},
        "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}},
        "kind": {"type": ["string", "null"], "enum": ["a", "b", None], "x-normalise": "term"},
    },
    "$defs": {"line": {"type": "object", "properties": {"price": {"type": "number", "x-normalise": "amount"}}}},
}


def test_what_is_to_be_normalised_is_asked_for_as_it_is_written() -> None:
    asked = strip_hints(SCHEMA, FieldSpec(by_format=True))
    assert asked["properties"]["day"] == {"type": "string", "description": "of purchase"}
    assert asked["properties"]["kind"] == {"type": ["string", "null"]}
    assert asked["$defs"]["line"]["properties"]["price"] == {"type": "string"}
    assert strip_hints(SCHEMA, FieldSpec())["properties"]["day"]["format"] == "date"
    hint = find_hint(SCHEMA["properties"]["kind"], FieldSpec())
    assert hint is not None and hint.terms == {"a": (), "b": ()} and hint.may_be_null


@pytest.mark.parametrize(
    ("row", "param"),
    [
        ({"type": "string", "x-normalise": "colour"}, "schema.properties.f.x-normalise"),
        ({"type": "string", "x-normalise": 5}, "schema.properties.f.x-normalise"),
        ({"type": "string", "x-normalise": "term"}, "schema.properties.f.x-normalise.values"),
        ({"type": "string", "x-normalise": {"kind": "date", "order": "DMY"}}, "schema.properties.f.x-normalise.order"),
        ({"type": "string", "x-normalise": {"kind": "date", "locale": "en"}}, "schema.properties.f.x-normalise.locale"),
        (
            {"type": "string", "x-normalise": {"kind": "term", "values": {"a": "b"}}},
            "schema.properties.f.x-normalise.values.a",
        ),
    ],
)
def test_a_hint_that_cannot_be_understood_is_refused_by_place(row: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        strip_hints({"type": "object", "properties": {"f": row}}, FieldSpec())
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ("yes", "normalise"),
        ({"decimal": ";"}, "normalise.decimal"),
        ({"date_order": "DYM"}, "normalise.date_order"),
        ({"currency": "euro"}, "normalise.currency"),
        ({"locale": "klingon"}, "normalise.locale"),
        ({"colour": 1}, "normalise.colour"),
    ],
)
def test_customs_that_do_not_exist_are_refused_by_name(given: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_field_specs(given)
    assert caught.value.param == param


def test_single_customs_go_before_the_locales() -> None:
    assert read_locale({"locale": "en-US", "date_order": "DMY"}, "normalise", ANY) == LocaleRules("DMY", ".", None)
