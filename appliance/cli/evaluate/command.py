"""appliance eval: how good models are on rows whose answers are known, side by side."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from appliance.cli.evaluate.temporary_node import start_temporary_node
from appliance.cli.node_client import KEY_VARIABLE, configured_url, read_key
from appliance.cli.options import ConfigOption, DataDirOption, JsonOption
from appliance.cli.output import exit_on_error, fail, say, say_json, stderr, stdout
from appliance.quality.evaluation.adapters import load_adapters
from appliance.quality.evaluation.client import EvalRequestOptions, NodeClient
from appliance.quality.evaluation.datasets import Dataset, DatasetRow, pick_examples, read_dataset, sample_rows
from appliance.quality.evaluation.record import AnswerRecord
from appliance.quality.evaluation.scoring import ScoredModel, compare_models, score_model

_FEWSHOT_SUFFIX = ("_test", "_fewshot")
ONSITE = "onsite/"


def eval_command(
    path: Annotated[Path, typer.Argument(metavar="DATASET", help="JSON Lines: texts with their right answers.")],
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="onsite/NAME, classifier/NAME or PROVIDER/NAME; may be given several times."),
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="Also asked, and the others are compared with it.")] = None,
    task: Annotated[str | None, typer.Option(help="Ask a saved task instead of the dataset's own question.")] = None,
    limit: Annotated[int | None, typer.Option(help="So many rows, drawn at random.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Draws the same rows and examples again.")] = 0,
    few_shot: Annotated[
        int, typer.Option(help="Examples to show: so many for each label, or in all for an extraction.", min=0)
    ] = 0,
    few_shot_from: Annotated[
        Path | None,
        typer.Option(help="Where they are drawn; empty: NAME_fewshot beside NAME_test, else rows not asked."),
    ] = None,
    debias: Annotated[bool, typer.Option("--debias", help="Ask decisions with the options in both orders.")] = False,
    content_free: Annotated[
        bool, typer.Option("--content-free", help="Take off what the model says to a text that says nothing.")
    ] = False,
    adapter_path: Annotated[
        Path | None, typer.Option("--adapter", help="TOML: how rows of another form are read.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests under way together.", min=1, max=64)] = 2,
    answers_path: Annotated[
        Path | None, typer.Option("--answers", help="Keep answers here; a run that was stopped goes on with them.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report here as JSON, besides.")] = None,
    start: Annotated[
        bool, typer.Option("--start", help="Start a node for each on-site model, and end it afterwards.")
    ] = False,
    url: Annotated[str | None, typer.Option("--node", help="Where the node is; empty: as configured, here.")] = None,
    key: Annotated[str | None, typer.Option(help=f"An API key; empty: {KEY_VARIABLE}.")] = None,
    config_path: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask models the same labelled rows and tell how good, how quick and how dear their answers are.

    Figures have their 95 % intervals; where two models' do not differ by more than chance, it says so.
    """
    if start and url is not None:
        fail("--start and --node are both given: the one starts a node, the other names one")
    if task is not None and (few_shot or debias or content_free):
        fail("--task brings its own examples and method: leave --few-shot, --debias and --content-free out")
    dataset = exit_on_error(lambda: read_dataset(path, load_adapters(adapter_path)))
    rows = sample_rows(dataset.rows, limit, seed)
    shown = _shown(dataset, rows, path, few_shot, few_shot_from, seed)
    record = exit_on_error(lambda: AnswerRecord(answers_path))
    labels = dataset.labels if dataset.adapter.kind == "decision" else ()
    options: dict[str, Any] = {"debias": True} if debias else {}
    options |= {"calibrate": "content_free"} if content_free else {}
    names = list(dict.fromkeys([*([baseline] if baseline else []), *(models or [])])) or ["auto"]
    scored: dict[str, ScoredModel] = {}
    for name in names:
        of_task = {} if name.startswith("classifier/") else options
        asking = EvalRequestOptions(
            dataset.adapter, name, labels, shown, task, of_task if dataset.adapter.kind == "decision" else {}
        )
        with _node(start, url, key, name, config_path, data_dir) as node:
            scored[name] = exit_on_error(partial(_asked, asking, node, rows, record, concurrency))
    report = _report(dataset, rows, scored, baseline, {"seed": seed, "few_shot": len(shown), "task": task, **options})
    if out is not None:
        out.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    say_json(report) if as_json else _print(report)
    if any(one.report["errors"] == len(rows) for one in scored.values()):
        raise typer.Exit(1)


@contextmanager
def _node(
    start: bool, url: str | None, key: str | None, model: str, config_path: Path | None, data_dir: Path | None
) -> Iterator[NodeClient]:
    if start:
        with start_temporary_node(
            model.removeprefix(ONSITE) if model.startswith(ONSITE) else None, config_path, data_dir
        ) as at:
            client = NodeClient(at, key)
            yield client
            client.close()
        return
    client = NodeClient(url or configured_url(config_path), read_key(key))
    if not client.is_ready():
        fail(f"no node answers at {client.url}: start one with `appliance serve`, name it with --node, or give --start")
    yield client
    client.close()


def _shown(
    dataset: Dataset, rows: Sequence[DatasetRow], path: Path, count: int, given: Path | None, seed: int
) -> Sequence[Mapping[str, Any]]:
    """Examples to show. None of them is a row that is asked."""
    if not count:
        return ()
    beside = path.with_name(path.name.replace(*_FEWSHOT_SUFFIX))
    source = given or (beside if beside != path and beside.exists() else None)
    if source is not None:
        pool = exit_on_error(lambda: read_dataset(source, [dataset.adapter])).rows
    else:
        asked = {row.line for row in rows}
        pool = [row for row in dataset.rows if row.line not in asked]
    texts = {row.text for row in rows}
    pool = [row for row in pool if row.text not in texts]
    if not pool:
        fail("no rows are left to be shown as examples: lower --limit or name a file with --few-shot-from")
    known = set(dataset.labels)
    if dataset.adapter.kind == "decision":
        pool = [row for row in pool if row.given[dataset.adapter.gold] in known]
    return pick_examples(pool, dataset.adapter, count, seed)


def _asked(
    asking: EvalRequestOptions, node: NodeClient, rows: Sequence[DatasetRow], record: AnswerRecord, concurrency: int
) -> ScoredModel:
    """Asks what has not been answered yet."""
    known = dict(record.known(asking, rows))
    places = {id(row): place for place, row in enumerate(rows)}
    left = [row for place, row in enumerate(rows) if place not in known]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr) as progress:
        bar = progress.add_task(asking.model, total=len(rows), completed=len(known))
        for reply in node.ask_rows(asking, left, concurrency):
            record.add(asking, reply)
            known |= {places[id(row)]: result for row, result in zip(reply.rows, reply.results, strict=True)}
            progress.advance(bar, len(reply.rows))
    return score_model(
        asking.adapter, rows, [known[place] for place in range(len(rows))], record.seconds(asking), asking.labels
    )


def _report(
    dataset: Dataset,
    rows: Sequence[DatasetRow],
    scored: Mapping[str, ScoredModel],
    baseline: str | None,
    asked: Mapping[str, Any],
) -> Mapping[str, Any]:
    found: dict[str, Any] = {
        "dataset": dataset.name,
        "adapter": dataset.adapter.name,
        "rows": len(rows),
        "of_rows": len(dataset.rows),
        **asked,
        "models": {name: one.report for name, one in scored.items()},
    }
    if baseline is not None:
        found["baseline"] = baseline
        found["against_baseline"] = {
            name: compare_models(one, scored[baseline]) for name, one in scored.items() if name != baseline
        }
    return found


_DECISION_FIGURES = {"accuracy": "accuracy", "macro_f1": "macro F1", "ece": "ECE"}
_OBJECT_FIGURES = {
    "field_exactness": "fields exact",
    "object_exactness": "objects exact",
    "micro_f1": "micro F1",
    "macro_f1": "macro F1",
    "token_f1": "token F1",
    "ece": "ECE",
    "not_in_text": "not in text",
}


def _print(report: Mapping[str, Any]) -> None:
    say(f"{report['dataset']}: {report['rows']} of {report['of_rows']} rows, seed {report['seed']}, "
        f"{report['few_shot']} examples shown; in brackets 95 % intervals")  # fmt: skip
    told = {name for one in report["models"].values() for name in one}
    figures = _DECISION_FIGURES if "accuracy" in told else _OBJECT_FIGURES
    shown = {name: title for name, title in figures.items() if name in told}
    table = Table(
        "model", *shown.values(), "answers/s", "seconds", "tokens", "cost USD", "errors", box=None, pad_edge=False
    )
    for name, one in report["models"].items():
        rate, cost = one["answers_per_second"], one["cost_usd"]
        table.add_row(
            name,
            *(_figure(one.get(figure)) for figure in shown),
            "" if rate is None else f"{rate:,.1f}",
            f"{one['seconds']:,.1f}",
            f"{one['input_tokens'] + one['output_tokens']:,}",
            "unknown" if cost is None else f"{cost:.6f}",
            str(one["errors"]),
        )
    stdout.print(table)
    for name, one in report["models"].items():
        if one["errors"]:
            say(f"{name}: {one['errors']} rows without an answer count as wrong; most often: {one['commonest_error']}")
        if "fields" in one:
            say(f"{name}: " + ", ".join(f"{field} {told['value']:.2f}" for field, told in one["fields"].items()))
    for name, row in (report.get("against_baseline") or {}).items():
        say(f"{name} against {report['baseline']}: {_figure(row['difference'], sign='+')}, {row['verdict']}")


def _figure(told: Any, sign: str = "") -> str:
    if told is None:
        return ""
    if isinstance(told, Mapping):
        return f"{told['value']:{sign}.3f} ({told['low']:{sign}.2f} to {told['high']:{sign}.2f})"
    return f"{told:.3f}"
