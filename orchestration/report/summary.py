"""Summary of a run in a few kilobytes, for the index of runs; stored as `report/summary.json`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestration.report.charts import MIN_AVERAGED, smooth
from orchestration.report.cost import Cost, Price
from orchestration.report.course import RunState
from orchestration.report.evaluation_summary import Sample, ScoreSummary, sample_summaries, score_summaries
from orchestration.report.findings import HeldOutChange, Point, finite_points, held_out_change
from orchestration.report.records import Interval, ReportData, TrainingSection

VERSION = 1
MAX_LINE, MAX_MARKS = 60, 30  # points of a curve, held-out points
DIGITS = 4  # significant ones, of a point
CURVES = {
    "loss": "Loss",
    "margin": "Margin",
    "implicit_accuracy": "Implicit accuracy",
    "pairs_per_s": "Pairs per second",
}
NOT_COMPARED = ("name", "storage", "report")  # sections of the configuration


@dataclass(frozen=True)
class AccuracySummary:
    """Held-out implicit accuracy before and after training."""

    before: Interval
    after: Interval


@dataclass(frozen=True)
class CurveSummary:
    """Curve: the averaged line of training, and the held-out points."""

    line: Sequence[Point]
    marks: Sequence[Point]


@dataclass(frozen=True)
class CostSummary:
    """Device hours of a run, and their price."""

    gpu_hours: float
    cpu_hours: float
    price: Price | None


@dataclass(frozen=True)
class RunSummary:
    """Run as the index shows it; every number is finite.

    Args:
        run: The run's name.
        written_at: ISO time of the report.
        state: A `RunState`.
        stage: The stage that runs, or at which the run ended.
        started_at: ISO time of the run's start.
        ended_at: ISO time of its end; None while it runs, and if its driver vanished.
        method: `train.method`.
        steps: Optimizer steps done.
        max_steps: Optimizer steps to do.
        rounds: Finished rounds.
        table_version: Version of the pair table.
        rows: Rows read.
        kept: Pairs kept.
        accuracy: Held-out implicit accuracy, if it was measured.
        scores: Scores of the evaluation.
        cost: Device hours.
        settings: Every setting as `key.path` -> its value as JSON.
        curves: For each of CURVES that has numbers.
        samples: At most MAX_SAMPLES samples.
    """

    run: str
    written_at: str
    state: str
    stage: str | None
    started_at: str | None
    ended_at: str | None
    method: str | None
    steps: int
    max_steps: int
    rounds: int
    table_version: int | None
    rows: int
    kept: int
    accuracy: AccuracySummary | None
    scores: Sequence[ScoreSummary]
    cost: CostSummary
    settings: Mapping[str, str]
    curves: Mapping[str, CurveSummary]
    samples: Sequence[Sample]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `summary.json`."""
        curves = {name: vars(curve) for name, curve in self.curves.items()}
        found = {
            "accuracy": self.accuracy and asdict(self.accuracy),
            "scores": [asdict(score) for score in self.scores],
            "cost": asdict(self.cost),
            "curves": curves,
            "samples": [vars(sample) for sample in self.samples],
        }
        return {"version": VERSION, **vars(self), **found}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "RunSummary":
        """Return the summary in `summary.json`.

        Raises:
            ValueError: It has another version, or a value of the wrong kind.
            KeyError: A field is missing.
            TypeError: A field has the wrong shape.
            AttributeError: A field has the wrong shape.
        """
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']}, not {VERSION}")
        return RunSummary(
            run=data["run"],
            written_at=data["written_at"],
            state=data["state"],
            stage=data["stage"],
            started_at=data["started_at"],
            ended_at=data["ended_at"],
            method=data["method"],
            steps=int(data["steps"]),
            max_steps=int(data["max_steps"]),
            rounds=int(data["rounds"]),
            table_version=data["table_version"],
            rows=int(data["rows"]),
            kept=int(data["kept"]),
            settings=data["settings"],
            accuracy=data["accuracy"] and AccuracySummary(*_intervals(data["accuracy"], "before", "after")),
            scores=[ScoreSummary(each["name"], *_intervals(each, "base", "aligned")) for each in data["scores"]],
            cost=_cost(data["cost"]),
            curves={name: CurveSummary(curve["line"], curve["marks"]) for name, curve in data["curves"].items()},
            samples=[Sample.from_json(each) for each in data["samples"]],
        )


def _intervals(data: Mapping[str, Any], *sides: str) -> list[Interval]:
    return [Interval.from_json(data[side]) for side in sides]


def _cost(data: Mapping[str, Any]) -> CostSummary:
    price = data["price"] and Price(*(data["price"][name] for name in ("amount", "hour", "currency")))
    return CostSummary(float(data["gpu_hours"]), float(data["cpu_hours"]), price)


def summary_of(data: ReportData) -> RunSummary:
    """Condense the data of a report."""
    training, dataset, train = data.training, data.dataset, data.config.get("train") or {}
    return RunSummary(
        run=data.name,
        written_at=data.created_at,
        state=data.state,
        stage=data.stage,
        started_at=data.started_at,
        ended_at=_ended_at(data),
        method=training.method if training else train.get("method"),
        steps=training.steps if training else 0,
        max_steps=training.max_steps if training else train.get("max_steps", 0),
        rounds=len(data.rounds),
        table_version=dataset.version if dataset else None,
        rows=dataset.num_rows if dataset else 0,
        kept=dataset.rows["kept"] if dataset else 0,
        accuracy=_accuracy(held_out_change(training)),
        scores=score_summaries(data.evaluation),
        cost=_condensed(data.cost),
        settings=dict(settings(data.config)),
        curves=_curves(training) if training else {},
        samples=sample_summaries(data.evaluation),
    )


def _ended_at(data: ReportData) -> str | None:
    """Return when the run ended; None while it runs, and if its driver vanished."""
    timeline = data.timeline
    return None if timeline is None or timeline.is_open or data.state == RunState.LOST else timeline.ended


def settings(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every setting as `key.path` and its value as JSON."""
    for name, value in config.items():
        if name not in NOT_COMPARED:
            yield from _leaves(name, value)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}", inner)
    else:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _accuracy(change: HeldOutChange | None) -> AccuracySummary | None:
    return None if change is None else AccuracySummary(change.before, change.after)


def _condensed(cost: Cost) -> CostSummary:
    return CostSummary(cost.gpu_hours, cost.cpu_hours, cost.price)


def _curves(training: TrainingSection) -> dict[str, CurveSummary]:
    found = {}
    for metric in CURVES:
        line, marks = finite_points(training.history, metric), finite_points(training.validation, metric)
        if len(line) >= MIN_AVERAGED:
            line = smooth(line)
        if line or marks:
            found[metric] = CurveSummary(_few(line, MAX_LINE), _few(marks, MAX_MARKS))
    return found


def _few(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most `most` points, rounded and evenly chosen, with both ends."""
    last = len(points) - 1
    chosen = points if last < most else [points[round(i * last / (most - 1))] for i in range(most)]
    return [(int(step), float(f"{value:.{DIGITS}g}")) for step, value in chosen]
