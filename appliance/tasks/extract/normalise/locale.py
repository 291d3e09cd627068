"""Customs of writing that a caller names: a locale, or single ones."""

from dataclasses import replace
from typing import Final

from babel import Locale, UnknownLocaleError

from appliance.core.json_types import JsonObject
from appliance.errors import RequestError
from appliance.tasks.extract.normalise.amounts import is_currency
from appliance.tasks.extract.normalise.normalised_value import DATE_ORDERS, LocaleRules
from appliance.wire.strict_fields import wrong

CUSTOMS: Final = ("locale", "date_order", "decimal", "currency")


def read_locale(given: JsonObject, path: str, base: LocaleRules) -> LocaleRules:
    """`base` with what `given` says: a locale first, then what is said besides. Raises RequestError."""
    for name in given:
        if name not in CUSTOMS:
            raise RequestError(f"{path}.{name} is not known: there are {', '.join(CUSTOMS)}", param=f"{path}.{name}")
    said = {name: value for name, value in given.items() if value is not None}
    locale = said.pop("locale", None)
    if locale is not None:
        try:
            base = replace(get_locale(str(locale)), currency=base.currency)
        except ValueError as error:
            raise RequestError(f"{path}.locale: {error}", param=f"{path}.locale") from error
    if said.get("date_order", "DMY") not in DATE_ORDERS:
        raise wrong(f"{path}.date_order", said["date_order"], f"it must be one of {', '.join(DATE_ORDERS)}")
    if said.get("decimal", ".") not in (".", ","):
        raise wrong(f"{path}.decimal", said["decimal"], 'it must be "." or ","')
    if not is_currency(said.get("currency", "EUR")):
        raise wrong(f"{path}.currency", said["currency"], "it must be an ISO 4217 code, such as EUR")
    return replace(base, **said)


def get_locale(locale: str) -> LocaleRules:
    """What is usual in a locale such as `en-GB`. Raises ValueError for one that is not known, or names no country."""
    try:
        found = Locale.parse(locale.replace("-", "_"))
    except (UnknownLocaleError, ValueError) as error:
        raise ValueError(f"{locale!r:.40} is not a locale: write a language and a country, such as en-GB") from error
    if found.language == "en" and found.territory is None:
        # Babel takes American customs then, and half of those who write English have others.
        raise ValueError(f"{locale!r} names no country, and English dates differ by country: write en-US or en-GB")
    pattern = found.date_formats["short"].pattern.lower()
    places: list[tuple[int, str]] = sorted((pattern.index(letter), letter.upper()) for letter in "dmy")
    order = "".join(letter for _, letter in places)
    sign = found.number_symbols.get("latn", {}).get("decimal")
    return LocaleRules(
        date_order=next((known for known in DATE_ORDERS if known == order), None),
        decimal=sign if sign in (".", ",") else None,
    )
