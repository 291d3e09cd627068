"""appliance models: what can be served, what lies here, and getting it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from appliance.catalog import Catalog, ModelSpec, Variant
from appliance.cli.options import ConfigOption, DataDirOption, JsonOption, load_node_catalog, resolve_data_dir
from appliance.cli.output import exit_on_error, format_bytes, say, say_json, stderr, stdout
from appliance.config import load_config
from appliance.node.models.download import PullProgress
from appliance.node.models.model_store import ModelStore, StoredModel

NameArgument = Annotated[str, typer.Argument(help="A name from `appliance models list`.")]
VariantOption = Annotated[str | None, typer.Option("--variant", help="Which form of it; empty: its first.")]

_PLAIN_EVERY_SECONDS = 5.0


def list_command(config_path: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Every model of the catalogue and every file that lies here."""
    catalog, store = _open(config_path, data_dir)
    rows = [_row(model, variant, store) for model in catalog.models for variant in model.variants]
    known = {(row["model"], row["variant"]) for row in rows}
    for stored in store.list_stored():
        if (stored.model, stored.variant) not in known:
            facts: dict[str, Any] = {"model": stored.model, "variant": stored.variant, "size_bytes": stored.size_bytes}
            rows.append({**facts, "here": True, "source": stored.source})
    if as_json:
        say_json(rows)
        return
    table = Table("model", "variant", "size", "engine", "licence", "here", box=None, pad_edge=False)
    for row in rows:
        here = row.get("source") or "yes" if row["here"] else ""
        cells = (row["model"], row["variant"], format_bytes(row["size_bytes"]))
        table.add_row(*cells, row.get("engine", ""), row.get("licence", ""), here)
    stdout.print(table)


def show_command(name: NameArgument, config_path: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Everything that is known of one model, as JSON."""
    catalog, store = _open(config_path, data_dir)
    model = _model(catalog, name)
    rows = [_row(model, variant, store) for variant in model.variants]
    facts = {field: getattr(model, field) for field in model.__slots__ if field != "variants"}
    say_json({**facts, "variants": rows})


def pull_command(
    name: NameArgument, variant: VariantOption = None, config_path: ConfigOption = None, data_dir: DataDirOption = None
) -> None:
    """Get a model: resumed where an earlier pull stopped, proven by checksum. Nothing is fetched twice."""
    catalog, store = _open(config_path, data_dir)
    model = _model(catalog, name)
    path = pull_with_progress(store, model, _variant(model, variant))
    say(str(path))


def verify_command(
    name: NameArgument, variant: VariantOption = None, config_path: ConfigOption = None, data_dir: DataDirOption = None
) -> None:
    """Read a model again and compare it with the checksum that was recorded."""
    catalog, store = _open(config_path, data_dir)
    chosen = variant or _variant(_model(catalog, name), None).name
    stored = exit_on_error(lambda: _with_progress(lambda report: store.verify(name, chosen, report)))
    say(f"{stored.path}: whole, sha256 {stored.sha256}")


def remove_command(
    name: NameArgument, variant: VariantOption = None, config_path: ConfigOption = None, data_dir: DataDirOption = None
) -> None:
    """Delete a model from this machine."""
    catalog, store = _open(config_path, data_dir)
    chosen = variant or _variant(_model(catalog, name), None).name
    say(f"{format_bytes(exit_on_error(lambda: store.remove(name, chosen)))} freed")


def pull_with_progress(store: ModelStore, model: ModelSpec, variant: Variant) -> Path:
    """Pull with a bar on a terminal, and with a line now and then elsewhere. Ends the program when it cannot be had."""
    return exit_on_error(lambda: _with_progress(lambda report: store.pull(model, variant, report))).path


def _with_progress(work: Callable[[Callable[[PullProgress], None]], StoredModel]) -> StoredModel:
    if not stderr.is_terminal:
        return work(_plain_reporter())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True) as progress:
        task = progress.add_task("", total=None)
        step = ""

        def report(now: PullProgress) -> None:
            nonlocal step
            if now.step != step:
                progress.reset(task, total=now.total_bytes)
                step = now.step
            text = f"{now.step} {now.what}{f' ({now.note})' if now.note else ''}"
            progress.update(task, description=text, completed=now.done_bytes, total=now.total_bytes)

        return work(report)


def _plain_reporter() -> Callable[[PullProgress], None]:
    said_at, step = 0.0, ""

    def report(now: PullProgress) -> None:
        nonlocal said_at, step
        if now.step == step and time.monotonic() - said_at < _PLAIN_EVERY_SECONDS:
            return
        said_at, step = time.monotonic(), now.step
        of = f" of {format_bytes(now.total_bytes)}" if now.total_bytes else ""
        done = f": {format_bytes(now.done_bytes)}{of}" if now.done_bytes else ""
        stderr.print(f"{now.step} {now.what}{done}{f' ({now.note})' if now.note else ''}")

    return report


def _open(config_path: Path | None, data_dir: Path | None) -> tuple[Catalog, ModelStore]:
    config = exit_on_error(lambda: load_config(config_path))
    home = resolve_data_dir(data_dir, config)
    return load_node_catalog(home), ModelStore(home)


def _model(catalog: Catalog, name: str) -> ModelSpec:
    return exit_on_error(lambda: catalog.get_model(name))


def _variant(model: ModelSpec, name: str | None) -> Variant:
    return model.variants[0] if name is None else exit_on_error(lambda: model.get_variant(name))


def _row(model: ModelSpec, variant: Variant, store: ModelStore) -> dict[str, Any]:
    return {
        "model": model.name,
        "variant": variant.name,
        "size_bytes": variant.size_bytes,
        "engine": variant.engine,
        "licence": model.licence,
        "here": store.find(model.name, variant.name) is not None,
    }
