"""The run's report, one self-contained HTML page: numbers and coordinates; `report.html.j2` has the markup."""

import base64
import functools
import hashlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import yaml
from markupsafe import Markup
from PIL import Image

from orchestration.report.encoding import encoding_view

DASH, MINUS = "\u2013", "\u2212"
MAX_POINTS = 400  # a line; with more the page grows and the eye gains nothing
MAX_SIDE = 512  # larger samples are shown as a copy of this side, so that a page stays a few MB
MAX_GRID_SIDE = 768  # the same for a grid of samples
RELOAD_S = 60  # after which the page of a run that goes on loads itself anew

SMALL = (300, 130)
CURVES: Sequence[tuple[str, Mapping[str, str], Mapping[str, Any]]] = (
    ("Loss", {"loss": "train"}, {}),
    ("Margin", {"margin": "train"}, {"guide": 0.0}),
    ("Implicit accuracy", {"implicit_accuracy": "train"}, {"guide": 0.5, "limits": (0.0, 1.0)}),
    ("Reward accuracy", {"reward_accuracy": "train"}, {"guide": 0.5, "limits": (0.0, 1.0)}),
    ("Denoising error", {"mse_chosen": "chosen", "mse_rejected": "rejected"}, {}),
    ("Gradient norm", {"grad_norm": "train"}, {"size": SMALL}),
    ("Learning rate", {"learning_rate": "train"}, {"size": SMALL}),
    ("Pairs a second", {"pairs_per_s": "train"}, {"size": SMALL, "limits": (0.0, None)}),
)  # title, key of a step -> its label, options of `chart`
SPEED = ("pairs_per_s", "step_s", "data_wait_ratio", "mfu", "hfu", "memory_bytes", "skipped_steps")  # keys of a step
STYLES = ("raw", "line", "marks")  # in the order of drawing

Point = tuple[float, float]


class Frame(NamedTuple):
    """The inner rectangle of a chart in SVG units, and the ranges it shows."""

    left: float
    right: float
    top: float
    bottom: float
    x_range: Point
    y_range: Point

    def x(self, value: float) -> float:
        """Where a value of the horizontal axis lies."""
        low, high = self.x_range
        return round(self.left + (self.right - self.left) * (value - low) / ((high - low) or 1.0), 2)

    def y(self, value: float) -> float:
        """Where a value of the vertical axis lies; values beyond the axis lie on its edge."""
        low, high = self.y_range
        ratio = (min(max(value, low), high) - low) / ((high - low) or 1.0)
        return round(self.bottom - (self.bottom - self.top) * ratio, 2)

    def path(self, points: Sequence[Point]) -> str:
        """The points, MAX_POINTS at most, as the `d` of an SVG path."""
        return "M" + "L".join(f"{self.x(x):g} {self.y(y):g}" for x, y in downsample(points))


@dataclass(frozen=True)
class Trace:
    """One series of a chart; style is `raw`, `line` or `marks`, tone is 0 or 1 (drawn solid or dashed)."""

    label: str
    style: str
    tone: int
    points: Sequence[Point]


def round_ticks(low: float, high: float, *, count: int = 5, min_step: float = 0.0) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten that enclose [low, high]; about `count` of them."""
    target = max(((high - low) or abs(high) or 1.0) / count, min_step)
    power = 10.0 ** math.floor(math.log10(target))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= target * 0.999)
    return [float(f"{i * step:.9g}") for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """A centred moving average over a twentieth of the series, so that it does not lag behind."""
    half = len(points) // 40
    total = np.concatenate([[0.0], np.cumsum([y for _, y in points])])
    first = np.maximum(np.arange(len(points)) - half, 0)
    last = np.minimum(np.arange(len(points)) + half + 1, len(points))
    means = (total[last] - total[first]) / (last - first)
    return [(x, float(mean)) for (x, _), mean in zip(points, means, strict=True)]


def downsample(points: Sequence[Point]) -> list[Point]:
    """At most MAX_POINTS points: the lowest and the highest of each bucket, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return list(points)
    kept: list[Point] = []
    for bucket in np.array_split(np.arange(len(points)), MAX_POINTS // 2):
        ends = {min(bucket, key=lambda i: points[i][1]), max(bucket, key=lambda i: points[i][1])}
        kept.extend(points[i] for i in sorted(ends))
    return kept


def chart(traces: Sequence[Trace], *, size: tuple[int, int] = (360, 200), guide: float | None = None,
          limits: tuple[float | None, float | None] = (None, None)) -> dict[str, Any]:  # fmt: skip
    """Where everything in a chart lies: its frame, ticks, paths and marks.

    The vertical axis covers every line and mark, and all but the extreme 1 % of a raw series: one spike
    must not flatten the rest. What lies beyond is drawn on the edge and counted in `beyond`.
    """
    raw = [y for trace in traces if trace.style == "raw" for _, y in trace.points]
    ys = [y for trace in traces if trace.style != "raw" for _, y in trace.points]
    ys += [] if guide is None else [guide]
    ys += [float(value) for value in np.percentile(raw, [0.5, 99.5])] if raw else []
    xs = [x for trace in traces for x, _ in trace.points]
    low = min(ys) if limits[0] is None else limits[0]
    high = max(ys) if limits[1] is None else limits[1]
    y_ticks = round_ticks(low, high, count=5 if size[1] > 150 else 2)
    x_range = (min(xs), max(max(xs), min(xs) + 1))
    x_ticks = [x for x in round_ticks(*x_range, count=size[0] // 60, min_step=1) if x_range[0] <= x <= x_range[1]]
    frame = Frame(46, size[0] - 16, 10, size[1] - 22, x_range, (y_ticks[0], y_ticks[-1]))
    return {
        "size": size, "frame": frame, "traces": traces, "guide": guide,
        "x_ticks": [(frame.x(x), tick_label(x)) for x in x_ticks],
        "y_ticks": [(frame.y(y), tick_label(y)) for y in y_ticks],
        "beyond": sum(not y_ticks[0] <= y <= y_ticks[-1] for y in raw),
    }  # fmt: skip


def curves(training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One chart for each entry of CURVES that has numbers; values that are not finite are left out."""
    charts, name = [], training.get("held_out", "held out")
    for title, keys, options in CURVES:
        traces = []
        for tone, (key, label) in enumerate(keys.items()):
            points, marks = _finite(training["history"], key), _finite(training["validation"], key)
            averaged = len(points) >= 40 and key != "learning_rate"
            if averaged and len(keys) == 1:
                traces.append(Trace(f"{label}, each step", "raw", tone, points))
            line = smooth(points) if averaged else points
            traces.append(Trace(f"{label}, average" if averaged else label, "line", tone, line))
            traces.append(Trace(name if len(keys) == 1 else f"{label}, {name}", "marks", tone, marks))
        drawn = sorted((each for each in traces if each.points), key=lambda each: STYLES.index(each.style))
        if drawn:
            charts.append({"title": title, **chart(drawn, **options)})
    return charts


def _finite(rows: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    values = [(float(row["step"]), row.get(key)) for row in rows]
    return [(step, float(value)) for step, value in values if value is not None and math.isfinite(value)]


def speed(training: Mapping[str, Any]) -> dict[str, float]:
    """How fast training was, as far as its steps say: medians, so that a few slow steps do not count.

    Waiting is a share of the time of all steps, memory the most of any, `skipped_steps` a count and absent without one.
    """
    of_steps = {key: [value for _, value in _finite(training["history"], key)] for key in SPEED}
    found = {key: float(np.median(values)) for key, values in of_steps.items() if values}
    found |= {key: max(of_steps[key]) for key in ("memory_bytes", "skipped_steps") if key in found}
    waiting, step_s = of_steps["data_wait_ratio"], of_steps["step_s"]
    if waiting and len(waiting) == len(step_s):
        found["data_wait_ratio"] = float(np.average(waiting, weights=step_s))
    return {key: value for key, value in found.items() if value or key != "skipped_steps"}


def wilson(ratio: float, count: int) -> dict[str, float]:
    """A share with its 95 % interval (Wilson 1927); the several draws of one pair count once, to be safe."""
    z2 = 1.96**2
    centre = (ratio + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (ratio * (1 - ratio) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return {"mean": ratio, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def change(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    """What became of a measure: `verb` (rose, fell, stayed) and whether the two intervals are `apart`."""
    delta = after["mean"] - before["mean"]
    verb = "rose" if delta > 0 else "fell" if delta < 0 else "stayed"
    apart = before["high"] < after["low"] or after["high"] < before["low"]
    return {"before": before, "after": after, "delta": delta, "verb": verb, "apart": apart}


def held_out(training: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The change of held-out implicit accuracy from before training to its end; None if not measured."""
    points = _finite(training["validation"], "implicit_accuracy") if training else []
    num_pairs = int(training["validation"][-1]["num_pairs"]) if training and points else 0
    if len(points) < 2 or points[0][0] != 0 or num_pairs < 1:
        return None
    return {**change(*(wilson(points[i][1], num_pairs) for i in (0, -1))), "num_pairs": num_pairs}


def _ends(score: Mapping[str, Any]) -> list[float]:
    return [score[side][end] for side in ("base", "aligned") for end in ("low", "mean", "high")]


def interval_plot(score: Mapping[str, Any]) -> dict[str, Any]:
    """A score's two intervals on one axis, with their change."""
    ticks = round_ticks(min(_ends(score)), max(_ends(score)), count=4)
    frame = Frame(58, 346, 8, 74, (ticks[0], ticks[-1]), (0.0, 1.0))
    return {**score, **change(score["base"], score["aligned"]), "frame": frame,
            "ticks": [(frame.x(tick), tick_label(tick)) for tick in ticks]}  # fmt: skip


@functools.lru_cache(maxsize=64)
def picture(image: bytes, max_side: int) -> dict[str, Any]:
    """An image as a data URI with its size; one with a longer side becomes a smaller copy."""
    with Image.open(io.BytesIO(image)) as opened:
        kind, size = Image.MIME[opened.format or "PNG"], opened.size
        if max(size) > max_side:
            opened.thumbnail((max_side, max_side))
            opened.convert("RGB").save(buffer := io.BytesIO(), "JPEG", quality=90)
            kind, image = "image/jpeg", buffer.getvalue()
    uri = f"data:{kind};base64,{base64.b64encode(image).decode()}"
    return {"uri": uri, "width": size[0], "height": size[1]}


def tick_label(value: float) -> str:
    """A number as an axis has it: 1,200, 0.25, 1e-5."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", MINUS, value < 0)
    return f"{value:,.6g}".replace("-", MINUS)


def number(value: float | None) -> str:
    """A measured number with three significant digits: 0.300, 12.0, 1,234."""
    if value is None or not math.isfinite(value):
        return DASH
    if 1e-3 <= abs(value) < 999.5:
        return f"{value:#.3g}".removesuffix(".").replace("-", MINUS)
    return tick_label(round(value) if abs(value) >= 1 else float(f"{value:.3g}"))


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: 12.3 s, 4 min 10 s, 2 h 05 min."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def moment(text: str, form: str = "%-d %B %Y, %H:%M %Z") -> str:
    """An ISO time as a person writes it: 23 November 2026, 23:10 UTC."""
    return datetime.fromisoformat(text).strftime(form)


def money(amount: float) -> str:
    """A price with two decimals, and thousands set apart."""
    return f"{amount:,.2f}"


def source_digest(text: str) -> str:
    """How a content security policy names the one inline style or script that it allows."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@functools.cache
def part(name: str) -> str:
    """A file of a page, such as its style."""
    return (Path(__file__).parent / name).read_text()


@functools.cache
def template(name: str) -> jinja2.Template:
    """A page's template, with the ways to write numbers."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(number=number, duration=duration, moment=moment, money=money)
    return environment.get_template(name)


class Widths:
    """The shares of bars as rules of the style: a strict policy allows no style in a tag."""

    def __init__(self, values: Iterable[float]) -> None:
        self._names = {float(value): f"grow-{i}" for i, value in enumerate(dict.fromkeys(map(float, values)))}

    def name(self, value: float) -> str:
        """The class of what grows by a value."""
        return self._names[float(value)]

    def rules(self) -> str:
        """The style of all these classes."""
        return "".join(f".{name} {{ flex-grow: {value:g}; }}\n" for value, name in self._names.items())


def time_left(training: Mapping[str, Any]) -> float | None:
    """Seconds that the steps to come will take at the speed of the steps so far; None if that is not known."""
    typical = speed(training).get("step_s")
    return None if typical is None else typical * (training["max_steps"] - training["steps"])


def render_report(data: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    """The page of a run. A stage that has not run (None) is said to be missing in its section.

    Args:
        data: What the run recorded, as `tests/orchestration/test_report.py` spells it out.
        images: The bytes of each image that the samples, the grids of training and the contact sheet of encoding
            name; one that is absent is shown as missing.
    """
    view = {**dict.fromkeys(("dataset", "encoding", "fingerprints", "training", "evaluation", "model")), **data}
    grids = {grid["image"] for grid in view["training"]["samples"]} if view["training"] else set()
    training, scores = view["training"], view["evaluation"]["scores"] if view["evaluation"] else []
    view |= {"encoding": encoding_view(view["encoding"]) if view["encoding"] else None}
    widths, is_live = _widths(view), training is not None and not training["is_over"]
    css = part("page.css") + widths.rules()
    return template("report.html.j2").render(
        view,
        css=Markup(css),  # noqa: S704  # ours, and numbers
        css_digest=source_digest(css),
        grow=widths.name,
        reload_s=RELOAD_S,
        is_open=view["state"] not in ("finished", "partial"),
        live=is_live,
        former=_former(view),
        left_s=time_left(training) if is_live and view["stage"] == "train" else None,
        created=datetime.fromisoformat(view["created_at"]),
        outcome=held_out(training),
        scores=[interval_plot(score) for score in scores if math.isfinite(sum(_ends(score)))],
        curves=curves(training) if training else [],
        speed=speed(training) if training else {},
        pictures={name: picture(image, MAX_GRID_SIDE if name in grids else MAX_SIDE) for name, image in images.items()},
        config_yaml=yaml.safe_dump(view["config"], sort_keys=False, allow_unicode=True),
    )


def _former(view: Mapping[str, Any]) -> list[str]:
    """Which results on the page are of an earlier training, because this one has not come so far."""
    states = {stage["name"]: stage["status"] for stage in view["stages"]}
    is_undone = {name: states.get(name, "done") not in ("done", "up to date") for name in ("train", "evaluate")}
    found = ["training"] if is_undone["train"] and view["training"] and view["training"]["is_over"] else []
    return found + (["samples and scores"] if any(is_undone.values()) and view["evaluation"] else [])


def _widths(view: Mapping[str, Any]) -> Widths:
    """Of all bars on the page."""
    rows = view["dataset"]["rows"].values() if view["dataset"] else []
    kinds = view["encoding"]["kinds"] if view["encoding"] else []
    return Widths([*rows, *(each["share"] for kind in kinds for each in kind["parts"])])
