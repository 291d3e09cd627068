"""What was measured of a model on this machine, when that still holds, and which variant and thread count follow. Pure.

The figures come from `python -m appliance.llamacpp.calibrate.program`. `calibrator` runs it; `calibration_store` keeps
them.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from appliance.config import ToleranceSettings, Workload

Extent = Literal["short", "full"]

_AS_GOOD_SHARE: Final = 0.03
"""Figures of one variant differ by as much from one run to the next, so less than this decides nothing."""


@dataclass(frozen=True, slots=True)
class MeasuredRate:
    """One measured speed, in tokens a second over all sequences together."""

    kind: Literal["prefill", "decode"]
    threads: int
    sequences: int
    """How many generated at once; 1 for prefill."""
    tokens_per_second: float
    tokens_per_core_second: float
    """By the CPU time that was used, even if other programs had the cores in between."""
    repeats: int
    disturbed: bool
    """Other programs held the cores in most repeats."""
    waited_share: float | None
    """Median share of the time that the engine's threads waited for a core; None if the system does not say."""

    @property
    def undisturbed(self) -> float:
        """Tokens a second that its CPU time comes to with all its threads at work; a little more than a clock shows,
        because threads wait for each other as well."""
        return self.tokens_per_core_second * self.threads


@dataclass(frozen=True, slots=True)
class VariantQuality:
    """A variant's answers beside its source's."""

    questions: int
    label_agreement: float
    """Share of the questions in which it chose its source's label, or one that the source found all but as likely."""
    same_label: float
    """Share of the questions in which it chose the very same label."""
    positions: int
    median_kl: float
    """Of the next-token distributions, in nats."""
    mean_kl: float


@dataclass(frozen=True, slots=True)
class VariantFigures:
    name: str
    size_bytes: int
    held_bytes: int
    """Memory it took with a context of 2,048 tokens."""
    derived_seconds: float | None
    """None: the file was there already."""
    quality: VariantQuality | None
    """None for the source, and where it was not measured."""
    figures: tuple[MeasuredRate, ...]


@dataclass(frozen=True, slots=True)
class SkippedVariant:
    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """What the program reported: every variant it got to, the source first."""

    source: str
    parameters: int
    variants: tuple[VariantFigures, ...]
    left_out: tuple[SkippedVariant, ...]
    llama_cpp: str
    system: str
    """What llama.cpp says it was built for."""
    load_average: float | None
    stolen_seconds: float | None
    """CPU time that the hypervisor gave to other machines meanwhile."""
    seconds: float
    kernels: str = ""
    """Which computed beside llama.cpp's own, or why none did. Older files do not say."""


@dataclass(frozen=True, slots=True)
class CalibrationKey:
    """What figures rest on. Another value of any of these, and they are measured again."""

    hardware: str
    file: str
    llama_cpp: str


@dataclass(frozen=True, slots=True)
class Calibration:
    key: CalibrationKey
    extent: Extent
    measured_at: str
    """ISO 8601, UTC."""
    measurement: Measurement

    @property
    def disturbed(self) -> bool:
        """Whether most of its figures were."""
        figures = [figure for variant in self.measurement.variants for figure in variant.figures]
        return 2 * sum(figure.disturbed for figure in figures) > len(figures)


def explain_staleness(known: CalibrationKey, now: CalibrationKey) -> str | None:
    """Why figures of `known` do not hold any more; None if they do."""
    reasons = []
    if known.hardware != now.hardware:
        reasons.append(f"on other hardware ({known.hardware}; this is {now.hardware})")
    if known.file != now.file:
        reasons.append("with another model file")
    if known.llama_cpp != now.llama_cpp:
        reasons.append(f"with llama.cpp {known.llama_cpp} (this is {now.llama_cpp})")
    return f"measured {' and '.join(reasons)}" if reasons else None


def merge_calibrations(old: Calibration | None, new: Calibration) -> Calibration:
    """The new measurement, with what only an older one of the same key has: variants, thread counts."""
    if old is None or old.key != new.key or old.measurement.source != new.measurement.source:
        return new
    fresh = {variant.name: variant for variant in new.measurement.variants}
    variants = [_merged_variant(known, fresh.pop(known.name, None)) for known in old.measurement.variants]
    extent: Extent = "full" if "full" in (old.extent, new.extent) else "short"
    return replace(new, extent=extent, measurement=replace(new.measurement, variants=(*variants, *fresh.values())))


def _merged_variant(old: VariantFigures, new: VariantFigures | None) -> VariantFigures:
    if new is None:
        return old
    measured = {(figure.kind, figure.threads, figure.sequences) for figure in new.figures}
    kept = [figure for figure in old.figures if (figure.kind, figure.threads, figure.sequences) not in measured]
    return replace(new, quality=new.quality or old.quality, figures=(*new.figures, *kept))


@dataclass(frozen=True, slots=True)
class WorkloadMix:
    """What a workload asks of an engine: one request's tokens, and how many run at once."""

    description: str
    prompt_tokens: int
    output_tokens: int
    sequences: int


WORKLOAD_MIXES: Final[Mapping[Workload, WorkloadMix]] = {
    "prefill": WorkloadMix("decisions and extraction", prompt_tokens=256, output_tokens=2, sequences=8),
    "balanced": WorkloadMix("a mix of reading and writing", prompt_tokens=300, output_tokens=100, sequences=8),
    "decode": WorkloadMix("writing", prompt_tokens=100, output_tokens=400, sequences=8),
}
"""Assumptions, good enough to tell variants apart; the order of the variants hardly depends on the exact numbers."""


@dataclass(frozen=True, slots=True)
class VariantChoice:
    variant: str
    threads: int
    reason: str
    """One or more sentences with figures."""


@dataclass(frozen=True, slots=True)
class _Option:
    """One variant with one number of threads, and what they come to."""

    variant: VariantFigures
    threads: int
    prefill: float
    decode: float
    seconds: float
    """For one request of the mix, when as many run as the mix says."""

    @property
    def words(self) -> str:
        return f"{self.prefill:,.0f} prompt tokens/s and {self.decode:,.0f} generated tokens/s"


def choose_variant(
    measurement: Measurement,
    workload: Workload,
    tolerance: ToleranceSettings,
    *,
    threads: int | None = None,
    available: Collection[str] | None = None,
) -> VariantChoice | None:
    """The variant and thread count that do the most of `workload`, among variants that answer as their source does.

    `threads`: fixed by the operator; then the nearest measured count speaks for it. `available`: variants whose files
    are there (None: all). None if the source itself has no figures to compare with.
    """
    mix = WORKLOAD_MIXES[workload]
    # One measure for all: CPU time makes everything a little quicker than the clock does.
    by_clock = not any(figure.disturbed for variant in measurement.variants for figure in variant.figures)
    options = [option for variant in measurement.variants for option in _options(variant, mix, threads, by_clock)]
    source = _best([option for option in options if option.variant.name == measurement.source], measurement.source)
    if source is None:
        return None
    refused = {
        variant.name: why for variant in measurement.variants if (why := _refusal(variant, measurement, tolerance))
    }
    gone = {variant.name for variant in measurement.variants if available is not None and variant.name not in available}
    usable = [option for option in options if option.variant.name not in refused and option.variant.name not in gone]
    chosen = _best(usable, measurement.source)
    if chosen is None:
        return None
    rivals = len({option.variant.name for option in options}) - 1
    sentences = [_first_sentence(chosen, source, rivals, mix, workload)]
    sentences += _why_not_others(chosen, options, refused, gone)
    if not by_clock:
        sentences.append("Other programs held the cores meanwhile, so these are reckoned from CPU time.")
    return VariantChoice(chosen.variant.name, threads or chosen.threads, " ".join(sentences))


def _options(variant: VariantFigures, mix: WorkloadMix, fixed_threads: int | None, by_clock: bool) -> list[_Option]:
    """One for each thread count. Where other programs held the cores, only the most threads are thought of: who was
    busy then may be gone tomorrow, and a choice of fewer threads would stay."""
    measured = sorted({figure.threads for figure in variant.figures})
    if fixed_threads is not None and measured:
        measured = [min(measured, key=lambda count: (abs(count - fixed_threads), count))]
    options = [option for count in measured if (option := _option(variant, count, mix, by_clock)) is not None]
    return options if by_clock else options[-1:]


def _option(variant: VariantFigures, threads: int, mix: WorkloadMix, by_clock: bool) -> _Option | None:
    rates = [
        (figure.kind, figure.sequences, figure.tokens_per_second if by_clock else figure.undisturbed)
        for figure in variant.figures
        if figure.threads == threads and figure.tokens_per_second > 0
    ]
    prefill = next((rate for kind, _, rate in rates if kind == "prefill"), 0.0)
    decode = _decode_at(mix.sequences, sorted((count, rate) for kind, count, rate in rates if kind == "decode"))
    if not prefill or not decode:
        return None
    return _Option(
        variant=variant,
        threads=threads,
        prefill=prefill,
        decode=decode,
        seconds=mix.prompt_tokens / prefill + mix.output_tokens / decode,
    )


def _decode_at(sequences: int, known: Sequence[tuple[int, float]]) -> float:
    """Tokens a second at so many sequences, between measured counts by a straight line; 0 if none was measured."""
    below = [pair for pair in known if pair[0] <= sequences]
    above = [pair for pair in known if pair[0] >= sequences]
    if not below or not above:
        nearest = below[-1:] or above[:1]
        return nearest[0][1] if nearest else 0.0
    (low, low_rate), (high, high_rate) = below[-1], above[0]
    return low_rate if high == low else low_rate + (sequences - low) / (high - low) * (high_rate - low_rate)


def _best(options: Sequence[_Option], source: str) -> _Option | None:
    """The quickest; of those that are as good as that, the source, then the smallest file, then the fewest threads."""
    if not options:
        return None
    enough = min(option.seconds for option in options) * (1 + _AS_GOOD_SHARE)
    good = [option for option in options if option.seconds <= enough]
    return min(good, key=lambda option: (option.variant.name != source, option.variant.size_bytes, option.threads))


def _refusal(variant: VariantFigures, measurement: Measurement, tolerance: ToleranceSettings) -> str | None:
    """Why a variant's answers are not taken for its source's; None if they are."""
    if variant.name == measurement.source:
        return None
    quality = variant.quality
    if quality is None:
        return "its answers were not compared"
    differing = round((1 - quality.label_agreement) * quality.questions)
    if differing > _may_differ(quality.questions, tolerance):
        return (
            f"it agreed with {measurement.source} on {quality.label_agreement:.1%} of {quality.questions} labels "
            f"(asked: {tolerance.label_agreement:.1%})"
        )
    if quality.median_kl > tolerance.median_kl:
        return f"its median KL from {measurement.source} is {quality.median_kl:.4f} (at most {tolerance.median_kl:g})"
    return None


def _may_differ(questions: int, tolerance: ToleranceSettings) -> int:
    """How many labels. One always, unless all are asked for: of a short form's few questions one is more than the
    tolerance, and says nothing. What spoils a model shows in the divergence as well."""
    share = 1 - tolerance.label_agreement
    return 0 if share == 0 else max(1, math.floor(share * questions))


def _first_sentence(chosen: _Option, source: _Option, rivals: int, mix: WorkloadMix, workload: Workload) -> str:
    threads = f"{chosen.threads} thread{'s' if chosen.threads > 1 else ''}"
    start = f"{chosen.variant.name} with {threads} does {chosen.words} at {mix.sequences} sequences"
    if chosen.variant.name == source.variant.name:
        if not rivals:
            return f"{start}; no other variant was measured."
        return f"{start}; no other variant that answers as it does is quicker for {workload} work ({mix.description})."
    ratio = source.seconds / chosen.seconds
    quality = chosen.variant.quality
    agreed = (
        ""
        if quality is None
        else f"; it agrees with it on {quality.label_agreement:.1%} of {quality.questions} labels, "
        f"median KL {quality.median_kl:.4f}"
    )
    return f"{start}, {ratio:.1f} times as quick as {source.variant.name} ({source.words}) for {workload} work{agreed}."


def _why_not_others(
    chosen: _Option, options: Sequence[_Option], refused: Mapping[str, str], gone: Collection[str]
) -> list[str]:
    """A sentence for every variant that would have been quicker."""
    sentences = []
    for name in dict.fromkeys(option.variant.name for option in options):
        ratio = chosen.seconds / min(option.seconds for option in options if option.variant.name == name)
        if name == chosen.variant.name or ratio <= 1 + _AS_GOOD_SHARE:
            continue
        why = refused.get(name) or ("its file is not here: `appliance calibrate` makes it" if name in gone else None)
        if why:
            sentences.append(f"{name} would be {ratio:.1f} times as quick, but {why}.")
    return sentences
