"""What came of a suite's tests, and which failures are answers by design.

A test is not applicable only where `not_applicable.toml` says so *and* the node answered with the very refusal that is
written there: a refusal in other words is a failure.
"""

import fnmatch
import re
import tomllib
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Result = Literal["passed", "failed", "not applicable"]
KNOWN = Path(__file__).with_name("not_applicable.toml")


@dataclass(frozen=True, slots=True)
class Outcome:
    suite: str
    test: str
    result: Result
    reason: str = ""
    said: str = ""
    """The failure's own words."""


@dataclass(frozen=True, slots=True)
class Rule:
    suite: str
    test: str
    """Patterns of shell's kind, with | between them."""
    says: str
    """A regular expression that must be found in the failure."""
    reason: str


def rules(path: Path = KNOWN) -> Sequence[Rule]:
    return [Rule(**row) for row in tomllib.loads(path.read_text("utf-8"))["rules"]]


def judged(suite: str, test: str, said: str, known: Iterable[Rule]) -> Outcome:
    """A test that failed or was skipped saying `said`."""
    for rule in known:
        tests = rule.test.split("|")
        is_about = fnmatch.fnmatchcase(suite, rule.suite) and any(fnmatch.fnmatchcase(test, one) for one in tests)
        if is_about and re.search(rule.says, said):
            return Outcome(suite, test, "not applicable", rule.reason, said)
    return Outcome(suite, test, "failed", _last_words(said), said)


def of_junit(suite: str, report: Path, known: Sequence[Rule]) -> list[Outcome]:
    """Every test of a report that pytest wrote."""
    outcomes = []
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name', '')}"
        broken = next((part for part in case if part.tag in ("failure", "error")), None)
        skipped = next((part for part in case if part.tag == "skipped"), None)
        if broken is not None:
            said = f"{broken.get('message', '')}\n{broken.text or ''}"
            outcomes.append(judged(suite, name, said, known))
        elif skipped is not None:
            outcomes.append(Outcome(suite, name, "not applicable", f"skipped: {skipped.get('message', '')[:120]}"))
        else:
            outcomes.append(Outcome(suite, name, "passed"))
    return outcomes


def _last_words(said: str) -> str:
    """The first line of a failure's message that says something."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return (lines[0] if lines else "it says nothing")[:300]


def table(outcomes: Sequence[Outcome], skipped: Mapping[str, str]) -> str:
    """As Markdown: a row a suite. `skipped`: suites that were not run, and why."""
    rows = ["| suite | passed | failed | not applicable |", "|---|---|---|---|"]
    suites = list(dict.fromkeys(one.suite for one in outcomes))
    for suite in suites:
        counts = Counter(one.result for one in outcomes if one.suite == suite)
        rows.append(f"| {suite} | {counts['passed']} | {counts['failed']} | {counts['not applicable']} |")
    rows += [f"| {suite} | not run: {why} | | |" for suite, why in skipped.items()]
    return "\n".join(rows)


def reasons(outcomes: Sequence[Outcome]) -> str:
    """Every failure, and how many tests every reason made not applicable."""
    lines = [f"FAILED {one.suite} {one.test}: {one.reason}" for one in outcomes if one.result == "failed"]
    counts = Counter((one.suite, one.reason) for one in outcomes if one.result == "not applicable")
    lines += [f"not applicable, {suite}, {count} tests: {reason}" for (suite, reason), count in counts.items()]
    return "\n".join(lines)
