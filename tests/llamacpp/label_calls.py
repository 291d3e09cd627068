"""Label calls put to a runner without an engine around it, for the tests of them."""

from collections.abc import Sequence

from appliance.llamacpp.engine_protocol import LabelItem, LabelScores
from appliance.llamacpp.labels.jobs import LabelJob
from appliance.llamacpp.model import LlamaModel
from appliance.llamacpp.scheduler.step import StepRunner


def score(model: LlamaModel, wanted: Sequence[LabelItem], *, together: bool = True) -> list[LabelScores]:
    """The scores of all items, asked in one call or (`together` is off) one after the other, by an engine that has
    cached nothing."""
    model.reset()
    runner = StepRunner(model)
    calls = [wanted] if together else [[item] for item in wanted]
    found = [scores for call in calls for scores in asked(runner, call)]
    assert runner.report_load().kv_used_tokens == 0
    return found


def asked(runner: StepRunner, call: Sequence[LabelItem]) -> list[LabelScores]:
    job = LabelJob(call)
    runner.submit_labels(job)
    while not runner.idle:
        runner.run_step()
    return [scores for scores in job.results if scores is not None]
