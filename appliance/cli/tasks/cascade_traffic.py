"""What `appliance classifiers show` tells of a classifier's traffic: thresholds, local share, agreement, candidates."""

from typing import Final

from rich.table import Table

from appliance.cli.output import say, stdout
from appliance.core.json_types import JsonObject

_SHOWN_DAYS: Final = 14
_SHOWN_NEWS: Final = 5


def print_traffic(traffic: JsonObject, shadow: JsonObject | None) -> None:
    over = f"each {traffic['over_texts']} texts" if traffic["over_texts"] else "the long run"
    say(
        f"route {traffic['route']}: at most {traffic['bound']:.1%} of {over} answered here and wrong, "
        f"with {traffic['confidence']:.0%} confidence"
    )
    for row in traffic["thresholds"]:
        stands = "no answer stands" if row["threshold"] is None else f"answers stand from {row['threshold']:.3f}"
        say(f"  version {row['version']}: {stands} ({row['reason']})")
    counts, learning = traffic["labels"], traffic["learning"]
    say(f"  labelled {counts['labels']}, audited {counts['audited']}, with texts kept {counts['texts']}")
    if traffic["days"]:
        table = Table("day", "texts", "answered here", "audited", "agreed", "feedback", box=None, pad_edge=False)
        for day in traffic["days"][-_SHOWN_DAYS:]:
            counted = (str(day[name]) for name in ("texts", "audited", "feedback"))
            texts, audited, feedback = counted
            table.add_row(day["day"], texts, _share(day["local_share"]), audited, _share(day["agreement"]), feedback)
        stdout.print(table)
    if learning["candidate"] is not None and shadow is not None:
        say(f"candidate: version {learning['candidate']}, differed on {shadow['disagreed']} of {shadow['texts']} texts")
    for line in traffic["news"][:_SHOWN_NEWS]:
        say(f"  {line}")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
