"""Layout of the charts of a report, in SVG units; `report.html.j2` has the markup."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from orchestration.report.findings import Point, finite_points
from orchestration.report.format import shortened, text_width, tick_label
from orchestration.report.records import Interval, TrainingSection

MAX_POINTS = 400  # of a line; more would only make the page larger
MIN_AVERAGED = 40  # steps: a shorter series is drawn as it is
NOISE_FREE = ("learning_rate",)
LARGE, SMALL = (360, 200), (300, 130)
MAX_LABEL, ROW_HEIGHT = 132, 30  # of a plot of intervals, in units
SMALL_HEIGHT = 150  # charts lower than this have few ticks
STYLES = ("raw", "line", "marks")  # in the order of drawing


class Frame(NamedTuple):
    """Inner rectangle of a chart in SVG units, and the ranges it shows."""

    left: float
    right: float
    top: float
    bottom: float
    x_range: Point
    y_range: Point

    def x(self, value: float) -> float:
        """Return where a value of the horizontal axis lies."""
        low, high = self.x_range
        return round(self.left + (self.right - self.left) * (value - low) / ((high - low) or 1.0), 2)

    def y(self, value: float) -> float:
        """Return where a value of the vertical axis lies; values beyond the axis lie on its edge."""
        low, high = self.y_range
        ratio = (min(max(value, low), high) - low) / ((high - low) or 1.0)
        return round(self.bottom - (self.bottom - self.top) * ratio, 2)

    def path(self, points: Sequence[Point]) -> str:
        """Return the points, at most MAX_POINTS, as the `d` of an SVG path."""
        return "M" + "L".join(f"{self.x(x):g} {self.y(y):g}" for x, y in downsample(points))


@dataclass(frozen=True)
class Trace:
    """Series of a chart; style is `raw`, `line` or `marks`; tone is 0 (solid) or 1 (dashed)."""

    label: str
    style: str
    tone: int
    points: Sequence[Point]


@dataclass(frozen=True)
class ChartSpec:
    """Curve that the page shows if there are numbers for it.

    Args:
        title: Its heading.
        labels: Metric -> its label.
        size: Width and height.
        guide: Value at which a dotted line is drawn: no lead, or chance.
        low: Fixed lower end of the vertical axis.
        high: Fixed upper end.
    """

    title: str
    labels: Mapping[str, str]
    size: tuple[int, int] = LARGE
    guide: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Chart:
    """Chart, ready to be drawn.

    Args:
        title: Its heading.
        size: Width and height.
        frame: Its inner rectangle.
        traces: What is drawn, in order.
        guide: Value of the dotted line.
        x_ticks: Place and label of each tick of the horizontal axis.
        y_ticks: The same for the vertical axis.
        beyond: Number of raw values beyond the axis.
    """

    title: str
    size: tuple[int, int]
    frame: Frame
    traces: Sequence[Trace]
    guide: float | None
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    beyond: int


CURVES = (
    ChartSpec("Loss", {"loss": "train"}),
    ChartSpec("Margin", {"margin": "train"}, guide=0.0),
    ChartSpec("Implicit accuracy", {"implicit_accuracy": "train"}, guide=0.5, low=0.0, high=1.0),
    ChartSpec("Reward accuracy", {"reward_accuracy": "train"}, guide=0.5, low=0.0, high=1.0),
    ChartSpec("Denoising error", {"mse_chosen": "chosen", "mse_rejected": "rejected"}),
    ChartSpec("Gradient norm", {"grad_norm": "train"}, size=SMALL),
    ChartSpec("Learning rate", {"learning_rate": "train"}, size=SMALL),
    ChartSpec("Pairs per second", {"pairs_per_s": "train"}, size=SMALL, low=0.0),
)


def curves(training: TrainingSection) -> list[Chart]:
    """Return a chart for each entry of CURVES that has finite numbers."""
    charts = []
    for spec in CURVES:
        traces = [
            trace
            for tone, (metric, label) in enumerate(spec.labels.items())
            for trace in _traces(training, metric, label, tone, is_alone=len(spec.labels) == 1)
            if trace.points
        ]
        if traces:
            charts.append(draw(spec, sorted(traces, key=lambda each: STYLES.index(each.style))))
    return charts


def _traces(training: TrainingSection, metric: str, label: str, tone: int, *, is_alone: bool) -> list[Trace]:
    """Return the steps of a metric, their average if there are many, and its held-out values."""
    points, marks = finite_points(training.history, metric), finite_points(training.validation, metric)
    held_out = Trace(training.held_out if is_alone else f"{label}, {training.held_out}", "marks", tone, marks)
    if len(points) < MIN_AVERAGED or metric in NOISE_FREE:
        return [Trace(label, "line", tone, points), held_out]
    average = Trace(f"{label}, average", "line", tone, smooth(points))
    raw = [Trace(f"{label}, each step", "raw", tone, points)] if is_alone else []
    return [*raw, average, held_out]


def draw(spec: ChartSpec, traces: Sequence[Trace]) -> Chart:
    """Lay out a chart.

    The vertical axis covers every line and mark, and all but the extreme 1 % of a raw series, so that one spike does
    not flatten the rest. Values beyond it are drawn on its edge and counted in `beyond`.
    """
    width, height = spec.size
    xs = [x for trace in traces for x, _ in trace.points]
    x_range = (min(xs), max(max(xs), min(xs) + 1))
    x_ticks = [x for x in round_ticks(*x_range, count=width // 60, min_step=1) if x_range[0] <= x <= x_range[1]]
    y_ticks = round_ticks(*_covered(spec, traces), count=5 if height > SMALL_HEIGHT else 2)
    frame = Frame(46, width - 16, 10, height - 22, x_range, (y_ticks[0], y_ticks[-1]))
    return Chart(
        title=spec.title,
        size=spec.size,
        frame=frame,
        traces=traces,
        guide=spec.guide,
        x_ticks=[(frame.x(x), tick_label(x)) for x in x_ticks],
        y_ticks=[(frame.y(y), tick_label(y)) for y in y_ticks],
        beyond=sum(not y_ticks[0] <= y <= y_ticks[-1] for y in _values(traces, is_raw=True)),
    )


def _covered(spec: ChartSpec, traces: Sequence[Trace]) -> Point:
    """Return the range of values that the vertical axis has to cover."""
    values, raw = _values(traces, is_raw=False), _values(traces, is_raw=True)
    if raw:
        values += [float(value) for value in np.percentile(raw, [0.5, 99.5])]
    if spec.guide is not None:
        values.append(spec.guide)
    low = min(values) if spec.low is None else spec.low
    return low, max(values) if spec.high is None else spec.high


def _values(traces: Sequence[Trace], *, is_raw: bool) -> list[float]:
    return [y for trace in traces if (trace.style == "raw") == is_raw for _, y in trace.points]


def round_ticks(low: float, high: float, *, count: int = 5, min_step: float = 0.0) -> list[float]:
    """Return the multiples of 1, 2 or 5 times a power of ten that enclose [low, high]; about `count` of them."""
    target = max(((high - low) or abs(high) or 1.0) / count, min_step)
    power = 10.0 ** math.floor(math.log10(target))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= target * 0.999)
    return [float(f"{i * step:.9g}") for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Return a centred moving average over a twentieth of the series, which does not lag behind."""
    half = len(points) // 40
    total = np.concatenate([[0.0], np.cumsum([y for _, y in points])])
    first = np.maximum(np.arange(len(points)) - half, 0)
    last = np.minimum(np.arange(len(points)) + half + 1, len(points))
    means = (total[last] - total[first]) / (last - first)
    return [(x, float(mean)) for (x, _), mean in zip(points, means, strict=True)]


def downsample(points: Sequence[Point]) -> list[Point]:
    """Return at most MAX_POINTS points: the lowest and the highest of each bucket, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return list(points)
    kept: list[Point] = []
    for bucket in np.array_split(np.arange(len(points)), MAX_POINTS // 2):
        ends = {min(bucket, key=lambda i: points[i][1]), max(bucket, key=lambda i: points[i][1])}
        kept.extend(points[i] for i in sorted(ends))
    return kept


@dataclass(frozen=True)
class IntervalRow:
    """Interval of one model, and the height at which it is drawn."""

    label: str
    interval: Interval
    is_ours: bool
    y: float


@dataclass(frozen=True)
class IntervalPlot:
    """Intervals of a score on one axis, a row for each model."""

    name: str
    rows: Sequence[IntervalRow]
    frame: Frame
    ticks: Sequence[tuple[float, str]]
    height: float


def interval_plot(name: str, intervals: Sequence[tuple[str, Interval, bool]]) -> IntervalPlot:
    """Lay out the intervals of a score.

    Args:
        name: Name of the score.
        intervals: Label of each row, its interval, and whether it is the run's own model.
    """
    labels = [shortened(label, MAX_LABEL) for label, _, _ in intervals]
    ends = [value for _, each, _ in intervals for value in (each.low, each.mean, each.high)]
    ticks = round_ticks(min(ends), max(ends), count=4)
    left, bottom = max(58, 14 + max(map(text_width, labels))), 14 + ROW_HEIGHT * len(intervals)
    frame = Frame(left, 342, 8, bottom, (ticks[0], ticks[-1]), (0.0, 1.0))
    rows = [
        IntervalRow(label, interval, is_ours, 28 + ROW_HEIGHT * number)
        for number, (label, (_, interval, is_ours)) in enumerate(zip(labels, intervals, strict=True))
    ]
    return IntervalPlot(name, rows, frame, [(frame.x(tick), tick_label(tick)) for tick in ticks], bottom + 22)
