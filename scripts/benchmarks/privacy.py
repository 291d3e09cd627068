"""The detector of personal data, measured on annotated texts: what it finds, what it finds where nothing is, how long.

`data/privacy` is looked for in APPLIANCE_EVAL_DATA, else beside the repository in shared/data. Half of the rows (by a
hash of their text) were looked at while the rules were written; the figures that count are those of the other half.
An entity is found when more than half of it lies in what was found, of whatever kind: any kind binds the request.
"""

import argparse
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args

from appliance.config.route_rules import STRUCTURED
from appliance.core import PersonalKind
from appliance.router.pii.patterns import PiiPatternDetector, find_personal_data, plain

ROOT: Final = Path(__file__).resolve().parents[2]

KIND_OF: Final[Mapping[str, PersonalKind]] = {
    "EMAIL": "email",
    "EMAIL_ADDRESS": "email",
    "PHONE": "phone",
    "PHONE_NUMBER": "phone",
    "CREDIT_CARD": "payment_card",
    "IBAN_CODE": "iban",
    "SSN": "national_id",
    "US_SSN": "national_id",
    "US_DRIVER_LICENSE": "driver_license",
    "IP_ADDRESS": "ip_address",
    "MRN": "medical_record",
    "STREET_ADDRESS": "postal_address",
    "PERSON": "person_name",
}
"""The data's types and the kinds that they are here. Types that identify nobody by themselves (TITLE, AGE, NRP, GPE,
LOCATION, ZIP_CODE, ORGANIZATION, DATE_TIME, DOMAIN_NAME) have none."""

ANNOTATED: Final = ("privacy/presidio_synth_v2.jsonl", "privacy/ambientmeta_standard_a.jsonl")
NEGATIVE: Final = "privacy/negatives_banking77.jsonl"
ELSEWHERE: Final = (
    "classification/agnews_test.jsonl",
    "classification/sms_spam_test.jsonl",
    "routing/routellm_gsm8k.jsonl",
    "routing/routellm_mmlu_29subjects.jsonl",
    "routing/llmrouter_9models_train_sample.jsonl",
    "routing/mtbench_scores.jsonl",
    "extraction/xquad_en_a.jsonl",
    "extraction/sroie_receipts.jsonl",
)
"""Texts that nobody annotated. Messages and receipts hold telephone numbers; news and exercises should hold little."""


class Row(NamedTuple):
    text: str
    entities: Sequence[Mapping[str, Any]]
    source: str


def data_folder() -> Path:
    given = os.environ.get("APPLIANCE_EVAL_DATA")
    return Path(given) if given else ROOT.parent / "shared" / "data"


def read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as file:
        parsed = [json.loads(line) for line in file]
    return [Row(_text(row), row.get("entities", ()), path.stem) for row in parsed]


def _text(row: Mapping[str, Any]) -> str:
    text = row.get("text") or row.get("context") or row.get("prompt") or row.get("question") or row.get("turns") or ""
    return text if isinstance(text, str) else "\n".join(map(str, text))


def is_tuning(row: Row) -> bool:
    return hashlib.sha256(row.text.encode()).digest()[0] % 2 == 0


class Tally(NamedTuple):
    total: int
    found: int
    as_its_kind: int

    @property
    def recall(self) -> float:
        return self.found / self.total if self.total else 0.0


def tally(rows: Iterable[Row]) -> tuple[Mapping[str, Tally], list[str]]:
    """By type of the data; and what was missed, for tuning."""
    total, found, right = Counter[str](), Counter[str](), Counter[str]()
    missed = []
    for row in rows:
        structured = find_personal_data(plain(row.text), STRUCTURED)
        weak = find_personal_data(plain(row.text), ("postal_address", "person_name"))
        for entity in row.entities:
            kind = KIND_OF.get(entity["type"])
            if kind is None:
                continue
            spans = [
                span
                for span in (structured if kind in STRUCTURED else weak)
                if 2 * (min(span.end, entity["end"]) - max(span.start, entity["start"]))
                > entity["end"] - entity["start"]
            ]
            total[entity["type"]] += 1
            found[entity["type"]] += bool(spans)
            right[entity["type"]] += any(span.kind == kind for span in spans)
            if not spans and kind in STRUCTURED:
                around = row.text[max(0, entity["start"] - 60) : entity["end"] + 20]
                missed.append(f"{entity['type']}: {entity['text']!r} in {around!r}")
    return {name: Tally(total[name], found[name], right[name]) for name in total}, missed


def show(tallies: Mapping[str, Tally]) -> Tally:
    """The table, and the sum over structured identifiers."""
    print(f"{'type':<20}{'kind':<17}{'entities':>9}{'found':>8}{'recall':>8}{'as its kind':>13}")
    structured = [one for name, one in tallies.items() if KIND_OF[name] in STRUCTURED]
    for name, one in sorted(tallies.items(), key=lambda item: (KIND_OF[item[0]] not in STRUCTURED, item[0])):
        share = one.as_its_kind / one.total
        print(f"{name:<20}{KIND_OF[name]:<17}{one.total:>9}{one.found:>8}{one.recall:>8.3f}{share:>13.3f}")
    whole = Tally(*(sum(column) for column in zip(*structured, strict=True)))
    share = whole.as_its_kind / whole.total
    print(f"{'structured, together':<37}{whole.total:>9}{whole.found:>8}{whole.recall:>8.3f}{share:>13.3f}\n")
    return whole


def bound_share(rows: Sequence[Row], kinds: Sequence[PersonalKind]) -> tuple[float, Counter[str], list[str]]:
    """Share of texts in which anything is found, which kinds, and some of it."""
    seen, examples, bound = Counter[str](), [], 0
    for row in rows:
        text = plain(row.text)
        spans = find_personal_data(text, kinds)
        bound += bool(spans)
        seen.update({span.kind for span in spans})
        examples += [f"{span.kind}: {text[max(0, span.start - 30) : span.end + 10]!r}" for span in spans[:1]]
    return bound / max(1, len(rows)), seen, examples


def time_of(detector: PiiPatternDetector, text: str, repeats: int) -> float:
    """Microseconds of this thread, the middle of `repeats` runs."""
    taken = []
    for _ in range(repeats):
        started = time.thread_time()
        detector.kinds_in(text)
        taken.append(time.thread_time() - started)
    return sorted(taken)[repeats // 2] * 1e6


def prompt_of(characters: int, rows: Sequence[Row]) -> str:
    return "\n\n".join(row.text for row in rows)[:characters]


def show_times(folder: Path) -> None:
    detector = PiiPatternDetector(STRUCTURED)
    prose = read(folder / "extraction/xquad_en_a.jsonl")
    cases = {
        "500 tokens of prose": (prompt_of(2_000, prose), 200),
        "2,000 tokens of prose": (prompt_of(8_000, prose), 100),
        "2,000 tokens of exercises": (prompt_of(8_000, read(folder / "routing/routellm_gsm8k.jsonl")), 100),
        "2,000 tokens of receipts": (prompt_of(8_000, read(folder / "extraction/sroie_receipts.jsonl")), 100),
        "2,000,000 characters of prose": (prompt_of(2_000_000, prose * 20), 3),
        "100,000 characters of digits": ("12-34 567 " * 10_000, 3),
        "100,000 times @": ("@" * 100_000, 3),
    }
    print(f"{'text':<34}{'microseconds':>14}")
    for name, (text, repeats) in cases.items():
        print(f"{name:<34}{time_of(detector, text, repeats):>14,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuning", action="store_true", help="the half that the rules were written on, with misses")
    parser.add_argument("--elsewhere", action="store_true", help="also texts that nobody annotated, with examples")
    options = parser.parse_args()
    folder = data_folder()
    if not (folder / "privacy").is_dir():
        raise SystemExit(f"no evaluation data at {folder}: set APPLIANCE_EVAL_DATA to the folder that holds privacy/")
    rows = [row for name in ANNOTATED for row in read(folder / name) if is_tuning(row) == options.tuning]
    print(f"{len(rows)} texts of the {'tuning' if options.tuning else 'other'} half\n")
    for source in sorted({row.source for row in rows}):
        print(source)
        tallies, missed = tally(row for row in rows if row.source == source)
        show(tallies)
        if options.tuning:
            print("\n".join(missed))
    print("both")
    whole = show(tally(rows)[0])
    negatives = [row for row in read(folder / NEGATIVE) if is_tuning(row) == options.tuning]
    share, _, examples = bound_share(negatives, STRUCTURED)
    print(f"false positives on {len(negatives)} texts without personal data: {share:.4f}", *examples, sep="\n  ")
    without = [row for row in rows if not any(KIND_OF.get(entity["type"]) in STRUCTURED for entity in row.entities)]
    share, seen, examples = bound_share(without, STRUCTURED)
    print(f"bound among {len(without)} annotated texts without a structured identifier: {share:.4f} {dict(seen)}")
    if options.tuning:
        print("  " + "\n  ".join(examples[:40]))
    if options.elsewhere:
        show_elsewhere(folder)
    print()
    show_times(folder)
    print(f"\nrecall on structured identifiers {whole.recall:.3f} (goal .95)")


def show_elsewhere(folder: Path) -> None:
    for name in ELSEWHERE:
        rows = read(folder / name)
        share, seen, examples = bound_share(rows, STRUCTURED)
        print(f"{name}: bound {share:.4f} of {len(rows)} {dict(seen)}")
        print("  " + "\n  ".join(examples[:: max(1, len(examples) // 12)][:12]))
        share, seen, _ = bound_share(rows, ("postal_address", "person_name"))
        print(f"  with addresses and names alone: {share:.4f} {dict(seen)}")


assert set(KIND_OF.values()) <= set(get_args(PersonalKind))

if __name__ == "__main__":
    main()
