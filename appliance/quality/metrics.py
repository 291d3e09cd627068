"""Cascades on the metrics page: texts, audits, thresholds. Collected when the page is asked for."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from appliance.quality.learning import CascadeLearning
from appliance.quality.models import COUNTS


class LearningMetrics(Collector):
    def __init__(self, learning: CascadeLearning, registry: CollectorRegistry) -> None:
        self._learning = learning
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        texts = CounterMetricFamily(
            "appliance_cascade_texts",
            "Texts of cascades since the start: all (texts), answered by the classifier (local), gone on, capped by "
            "the rate, audited, and of those agreed.",
            labels=["classifier", "what"],
        )
        for classifier, day in self._learning.totals.items():
            for name in COUNTS:
                texts.add_metric([classifier, name], getattr(day, name))
        yield texts
        threshold = GaugeMetricFamily(
            "appliance_cascade_threshold",
            "From which confidence on a classifier's answers stand; 2 where nothing keeps the bound, so all go on.",
            labels=["classifier", "version", "bound"],
        )
        for key, found in self._learning.thresholds.items():
            threshold.add_metric(
                [key.classifier, key.version, f"{key.bound:g}"], 2.0 if found.threshold is None else found.threshold
            )
        yield threshold
