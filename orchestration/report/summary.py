"""A run in a few kilobytes: what the index of runs shows of it and compares, kept as `report/summary.json`."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestration.report.page import Point, held_out, smooth

VERSION = 1
MAX_LINE, MAX_MARKS = 60, 30  # points of a curve, held-out points
MAX_SAMPLES = 12
MAX_PROMPT = 200  # characters
DIGITS = 4  # that are significant, of a curve
CURVES = {
    "loss": "Loss",
    "margin": "Margin",
    "implicit_accuracy": "Implicit accuracy",
    "pairs_per_s": "Pairs a second",
}
NOT_COMPARED = ("name", "storage", "report")  # of the configuration


def summary_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """A run's summary, from what its report is made of; every number is finite, so that browsers can read it."""
    training, evaluation, dataset = data["training"], data["evaluation"], data["dataset"]
    accuracy = held_out(training)
    return {
        "version": VERSION,
        "run": data["name"],
        "written_at": data["created_at"],
        "state": data["state"],
        "stage": data["stage"],
        "started_at": data["started_at"],
        "ended_at": _ended_at(data),
        "method": training["method"] if training else (data["config"].get("train") or {}).get("method"),
        "steps": training["steps"] if training else 0,
        "max_steps": training["max_steps"] if training else (data["config"].get("train") or {}).get("max_steps", 0),
        "rounds": len(data["rounds"]),
        "table_version": dataset["version"] if dataset else None,
        "rows": sum(dataset["rows"].values()) if dataset else 0,
        "kept": dataset["rows"]["kept"] if dataset else 0,
        "accuracy": accuracy and {side: accuracy[side] for side in ("before", "after")},
        "scores": _scores(evaluation),
        "cost": {name: data["cost"][name] for name in ("gpu_hours", "cpu_hours", "price")},
        "settings": dict(settings(data["config"])),
        "curves": _curves(training) if training else {},
        "samples": [
            {
                "prompt": each["prompt"][:MAX_PROMPT],
                "seed": each["seed"],
                "base": each["base"],
                "aligned": each["aligned"],
            }
            for each in (evaluation["samples"] if evaluation else [])[:MAX_SAMPLES]
        ],
    }


def _ended_at(data: Mapping[str, Any]) -> str | None:
    """When the run ended; None while it goes on, and where its driver went without a word."""
    timeline = data["timeline"]
    return None if timeline is None or timeline["is_open"] or data["state"] == "lost" else timeline["ended"]


def settings(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every setting as `key.path` and its value as JSON."""
    for name, value in config.items():
        if name not in NOT_COMPARED:
            yield from _leaves(name, value)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}", inner)
    else:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _scores(evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    found = []
    for score in evaluation["scores"] if evaluation else []:
        sides = {side: {end: score[side][end] for end in ("low", "mean", "high")} for side in ("base", "aligned")}
        if all(math.isfinite(value) for side in sides.values() for value in side.values()):
            found.append({"name": score["name"], **sides})
    return found


def _curves(training: Mapping[str, Any]) -> dict[str, dict[str, list[Point]]]:
    """Of each of CURVES that has numbers: the line of training, averaged, and the held-out points."""
    found = {}
    for key in CURVES:
        line = _finite(training["history"], key)
        if len(line) >= 40:
            line = smooth(line)
        marks = _finite(training["validation"], key)
        if line or marks:
            found[key] = {"line": _few(line, MAX_LINE), "marks": _few(marks, MAX_MARKS)}
    return found


def _finite(rows: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]


def _few(points: Sequence[Point], most: int) -> list[Point]:
    """So many of the points at most, evenly chosen, with both ends; values are rounded."""
    last = len(points) - 1
    chosen = points if last < most else [points[round(i * last / (most - 1))] for i in range(most)]
    return [(int(step), float(f"{value:.{DIGITS}g}")) for step, value in chosen]
