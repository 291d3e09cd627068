"""Jobs on the metrics page: what runs, what waits, how fast. Collected when the page is asked for."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from appliance.jobs.manager import JobManager


class JobMetrics(Collector):
    def __init__(self, manager: JobManager, registry: CollectorRegistry) -> None:
        self._manager = manager
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        manager, runs = self._manager, list(self._manager.running.values())
        states = GaugeMetricFamily("appliance_jobs", "Batches that have not ended, by state.", labels=["state"])
        for state in ("validating", "running", "paused", "waiting", "ending"):
            states.add_metric([state], sum(run.progress.state == state for run in runs))
        yield states
        waiting = sum(run.batch.counts.left for run in runs)
        yield GaugeMetricFamily("appliance_job_lines_waiting", "Lines of batches not answered yet.", value=waiting)
        late = sum(run.progress.late_lines for run in runs)
        yield GaugeMetricFamily("appliance_job_lines_late", "Of those, would be late on-site at this pace.", value=late)
        pace = sum(run.progress.lines_per_second or 0.0 for run in runs)
        yield GaugeMetricFamily("appliance_job_lines_per_second", "Lines answered on-site a second.", value=pace)
        under_way = sum(run.progress.lines_in_flight for run in runs)
        yield GaugeMetricFamily("appliance_job_lines_under_way", "Lines that are being asked.", value=under_way)
        posted = sum(run.progress.lines_at_providers for run in runs)
        yield GaugeMetricFamily("appliance_job_lines_posted", "Lines that lie in providers' own batches.", value=posted)
        done = CounterMetricFamily(
            "appliance_job_lines", "Lines of batches since the start, by result.", labels=["what"]
        )
        for what in ("completed", "failed", "copied", "onsite", "hosted"):
            now = sum(getattr(run.batch.counts, what) for run in runs)
            done.add_metric([what], manager.lines_done[what] + now)
        yield done
        ended = CounterMetricFamily(
            "appliance_jobs_ended", "Batches ended since the start, by status.", labels=["status"]
        )
        for status, count in manager.ended.items():
            ended.add_metric([status], count)
        yield ended
