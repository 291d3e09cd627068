"""Every command with its help. A command's module is imported when it runs, so `--help` loads no engine or server."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import typer
from typer.core import TyperCommand


@dataclass(frozen=True, slots=True)
class CommandEntry:
    """One command. `help` is the first paragraph of the function's docstring; a test holds them together."""

    name: str
    place: str
    """`module:function`, the module below appliance.cli."""
    help: str

    def load(self) -> Callable[..., None]:
        """Import the function behind the command."""
        module, _, function = self.place.partition(":")
        loaded: Callable[..., None] = getattr(import_module(f"appliance.cli.{module}"), function)
        return loaded


@dataclass(frozen=True, slots=True)
class CommandGroup:
    """Commands that share their first word."""

    name: str
    help: str
    commands: Sequence[CommandEntry]


_MAX_HELP_COLUMNS: Final = 120

COMMANDS: Final[Sequence[CommandEntry | CommandGroup]] = (
    CommandEntry(
        "serve",
        "serve:serve_command",
        "Run a node: pull the model if it is not here, start the engine, serve the API until stopped.",
    ),
    CommandEntry(
        "probe",
        "hardware:probe_command",
        "Measure this machine: processors, memory and GPUs as this program may use them.",
    ),
    CommandEntry(
        "plan",
        "hardware:plan_command",
        "Say for every model and variant whether it fits, with what context and how many sequences, or why not.",
    ),
    CommandEntry(
        "doctor",
        "doctor:doctor_command",
        "Look at everything that a node depends on, and say what to do about what is wrong. Changes nothing.",
    ),
    CommandEntry(
        "calibrate",
        "models.calibrate:calibrate_command",
        "Measure a model on this machine: speed by variant, threads and sequences, and what each variant costs in "
        "quality.",
    ),
    CommandEntry(
        "calibrate-task",
        "tasks.calibrate_task:calibrate_task_command",
        "Fit temperature and biases of a task on labelled examples, at the running node, which remembers them.",
    ),
    CommandEntry(
        "eval",
        "evaluate.command:eval_command",
        "Ask models the same labelled rows and tell how good, how quick and how dear their answers are.",
    ),
    CommandEntry(
        "report",
        "report:report_command",
        "What was asked, who answered, and what it cost. Works while the node runs and when it does not.",
    ),
    CommandGroup(
        "jobs",
        "Batches of a running node.",
        (
            CommandEntry(
                "list",
                "jobs:list_command",
                "Batches, newest first: how far they are, how fast, and when they will be done.",
            ),
            CommandEntry(
                "watch",
                "jobs:watch_command",
                "Follow one batch until it has ended; ends with 0 if it was completed.",
            ),
            CommandEntry(
                "cancel",
                "jobs:cancel_command",
                "End a batch: what it has answered is kept, and the other lines are named in its error file.",
            ),
        ),
    ),
    CommandGroup(
        "models",
        "Models: the catalogue, and what lies on this machine.",
        (
            CommandEntry(
                "list",
                "models.models:list_command",
                "Every model of the catalogue and every file that lies here.",
            ),
            CommandEntry("show", "models.models:show_command", "Everything that is known of one model, as JSON."),
            CommandEntry(
                "pull",
                "models.models:pull_command",
                "Get a model: resumed where an earlier pull stopped, proven by checksum. Nothing is fetched twice.",
            ),
            CommandEntry(
                "verify",
                "models.models:verify_command",
                "Read a model again and compare it with the checksum that was recorded.",
            ),
            CommandEntry("remove", "models.models:remove_command", "Delete a model from this machine."),
        ),
    ),
    CommandGroup(
        "classifiers",
        "Classifiers: trained here on labelled examples.",
        (
            CommandEntry(
                "train",
                "tasks.classifiers:train_command",
                "Train a new version at the running node; it serves as soon as it is written. Ctrl-C cancels.",
            ),
            CommandEntry("list", "tasks.classifiers:list_command", "Every classifier of the node."),
            CommandEntry(
                "show",
                "tasks.classifiers:show_command",
                "How good a classifier is on examples that it was not fitted on.",
            ),
            CommandEntry("evaluate", "tasks.classifiers:evaluate_command", "Measure a classifier on other examples."),
            CommandEntry(
                "rollback",
                "tasks.classifiers:rollback_command",
                "Let an earlier version serve again. No version is lost.",
            ),
            CommandEntry("remove", "tasks.classifiers:remove_command", "Delete a classifier with all its versions."),
            CommandEntry(
                "learn",
                "tasks.classifiers:learn_command",
                "Train a candidate on what traffic has taught; it serves once it is found better.",
            ),
            CommandEntry(
                "forget",
                "tasks.classifiers:forget_command",
                "Remove the labels and texts kept of a key's requests. Versions that were trained on them stay.",
            ),
        ),
    ),
    CommandGroup(
        "tasks",
        "Saved tasks of a running node.",
        (
            CommandEntry(
                "save",
                "tasks.saved_tasks:save_command",
                "Save a task, or a new version of it. FILE has the fields of `POST /v1/tasks` but the name.",
            ),
            CommandEntry(
                "list",
                "tasks.saved_tasks:list_command",
                "Every task that the key may use, and names that were calibrated without being saved.",
            ),
            CommandEntry("show", "tasks.saved_tasks:show_command", "One task as JSON, as it can be saved again."),
            CommandEntry(
                "remove",
                "tasks.saved_tasks:remove_command",
                "Delete a task with all its versions, and what was calibrated under its name.",
            ),
        ),
    ),
    CommandGroup(
        "engines",
        "vLLM: install, list and remove. The CPU engine (llama.cpp) comes with the appliance.",
        (
            CommandEntry(
                "install",
                "models.engines:install_command",
                "Make an environment with vLLM in the user's cache: the versions this release was made for, checked "
                "by hash.",
            ),
            CommandEntry(
                "list", "models.engines:list_command", "The vLLMs on this machine, and which one the node uses."
            ),
            CommandEntry(
                "remove", "models.engines:remove_command", "Delete an environment that was installed by command."
            ),
        ),
    ),
    CommandGroup(
        "policy",
        "The routing policy.",
        (
            CommandEntry(
                "check",
                "policy:check_command",
                "Say whether a policy is valid for this configuration; a mistake is named with its line and field.",
            ),
            CommandEntry(
                "show", "policy:show_command", "Print a policy: its text, or as JSON what the node makes of it."
            ),
            CommandEntry(
                "diff",
                "policy:diff_command",
                "Say in words what changes from one policy to another: routes that come, go and move, and every field.",
            ),
            CommandEntry(
                "explain",
                "policy:explain_command",
                "Say which route a request would take, which targets in which order, and why; nothing is called.",
            ),
        ),
    ),
    CommandGroup(
        "keys",
        "API keys for the node's HTTP API.",
        (
            CommandEntry(
                "create",
                "keys:create_command",
                "Make a key. It is printed once and only its SHA-256 is kept; a running node knows it within seconds.",
            ),
            CommandEntry(
                "list",
                "keys:list_command",
                "Every key made by command, with what it may do. Nobody can read the keys themselves.",
            ),
            CommandEntry(
                "revoke", "keys:revoke_command", "Make a key useless; a running node refuses it within seconds."
            ),
        ),
    ),
    CommandEntry(
        "docs",
        "docs:docs_command",
        "Show a page of the manual, or list the pages; `map` lists the program's files.",
    ),
)


def build_app(commands: Sequence[CommandEntry | CommandGroup] = COMMANDS) -> typer.Typer:
    """The command line over `commands`. Nothing of theirs is imported yet."""
    app = _make_typer(
        "Serve open-weight models on your own hardware; decide per request what stays and what overflows."
    )
    for entry in commands:
        if isinstance(entry, CommandEntry):
            _add_command(app, entry)
            continue
        group = _make_typer(entry.help)
        for command in entry.commands:
            _add_command(group, command)
        app.add_typer(group, name=entry.name)
    return app


def _make_typer(text: str) -> typer.Typer:
    # Help in plain text: drawing it with rich takes longer than everything else that `--help` does.
    return typer.Typer(
        help=text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"max_content_width": _MAX_HELP_COLUMNS},
    )


def _add_command(app: typer.Typer, entry: CommandEntry) -> None:
    class Command(_LazyCommand):
        function = staticmethod(entry.load)

    @app.command(entry.name, cls=Command, help=entry.help)
    def placeholder() -> None:
        """Stands in for the function until the command runs."""


class _LazyCommand(TyperCommand):
    """Shows its help in a list, and becomes the real command as soon as it is to run."""

    function: Callable[[], Callable[..., None]]

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        app = _make_typer("")
        app.command(self.name)(self.function())
        return typer.main.get_command(app).make_context(info_name, args, parent, **extra)


app = build_app()
