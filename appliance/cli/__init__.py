"""The commands. Each file is one; this one only gathers them."""

import typer

from appliance.cli import jobs, keys, policy
from appliance.cli.doctor import doctor_command
from appliance.cli.evaluate.command import eval_command
from appliance.cli.hardware import plan_command, probe_command
from appliance.cli.models import engines, models
from appliance.cli.models.calibrate import calibrate_command
from appliance.cli.report import report_command
from appliance.cli.serve import serve_command
from appliance.cli.tasks import classifiers, saved_tasks
from appliance.cli.tasks.calibrate_task import calibrate_task_command

app = typer.Typer(
    help="Serve open-weight models on your own hardware; decide per request what stays and what overflows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("serve")(serve_command)
app.command("probe")(probe_command)
app.command("plan")(plan_command)
app.command("doctor")(doctor_command)
app.command("calibrate")(calibrate_command)
app.command("calibrate-task")(calibrate_task_command)
app.command("eval")(eval_command)
app.command("report")(report_command)
app.add_typer(jobs.app, name="jobs")
app.add_typer(models.app, name="models")
app.add_typer(classifiers.app, name="classifiers")
app.add_typer(saved_tasks.app, name="tasks")
app.add_typer(engines.app, name="engines")
app.add_typer(policy.app, name="policy")
app.add_typer(keys.app, name="keys")
