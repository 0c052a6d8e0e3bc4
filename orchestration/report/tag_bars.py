"""Bars of a suite's scores by tag: means of scores whose zero means something, else differences from the reference."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestration.report.charts import round_ticks
from orchestration.report.format import shortened, text_width, tick_label
from orchestration.report.suite_view import ScoreGroup, SuiteView
from pipelines.suites.results import SuiteResult, TagDifference, TagScore

LEFT, RIGHT = 92.0, 318.0  # SVG units, of a width of 360; values are written to the right
TOP, ROW_HEIGHT, HEAD_HEIGHT, GAP = 6.0, 15.0, 18.0, 8.0
MAX_LABEL, MAX_TAG = 90.0, 350.0  # of a model's name, and of a tag with its count
SHARE = re.compile(r"\b0 (to|or) 1\b")


@dataclass(frozen=True)
class Bar:
    """Bar of one model.

    Args:
        model: The model.
        label: Its name as it is written.
        is_ours: Whether it is the run's own model.
        value: The mean or the difference; low and high are its 95 % interval.
        low: Lower end.
        high: Upper end.
        y: Height of its middle.
    """

    model: str
    label: str
    is_ours: bool
    value: float
    low: float
    high: float
    y: float


@dataclass(frozen=True)
class TagGroup:
    """Bars of one tag, the tag as it is written, and the height of its heading."""

    tag: str
    label: str
    num_prompts: int
    y: float
    bars: Sequence[Bar]


@dataclass(frozen=True)
class TagBars:
    """Bars of one score by tag.

    Args:
        scorer: The score.
        is_difference: Whether the bars are differences from the reference.
        groups: The tags.
        x_range: Values at the ends of the axis.
        ticks: Place and label of each tick.
        height: Of the chart.
    """

    scorer: str
    is_difference: bool
    groups: Sequence[TagGroup]
    x_range: tuple[float, float]
    ticks: Sequence[tuple[float, str]]
    height: float

    def x(self, value: float) -> float:
        """Return where a value lies."""
        low, high = self.x_range
        ratio = (min(max(value, low), high) - low) / ((high - low) or 1.0)
        return round(LEFT + (RIGHT - LEFT) * ratio, 2)


def tag_bars(view: SuiteView, models: Sequence[str]) -> list[TagBars]:
    """Return bars for each primary score of a suite with tags, or for each score if none is primary.

    Args:
        view: The suite.
        models: The models, in the order of their bars.
    """
    primary = [group for group in view.groups if group.is_primary] or list(view.groups)
    found = (_bars(group, view, models) for group in primary)
    return [each for each in found if each is not None]


def _bars(group: ScoreGroup, view: SuiteView, models: Sequence[str]) -> TagBars | None:
    is_difference = not SHARE.search(group.judge.scale)
    shown = [each for each in models if each != view.result.against_model] if is_difference else list(models)
    groups: list[TagGroup] = []
    y = TOP
    for tag, num_prompts in view.result.tags.items():
        values = _values(view.result, group.scorer, tag, shown, is_difference=is_difference)
        if not values:
            continue
        first = y + HEAD_HEIGHT + ROW_HEIGHT / 2
        rows = [
            Bar(model, shortened(model, MAX_LABEL), model == view.ours, *ends, first + ROW_HEIGHT * place)
            for place, (model, ends) in enumerate(values.items())
        ]
        groups.append(TagGroup(tag, _of_tag(tag, num_prompts), num_prompts, y + 12, rows))
        y += HEAD_HEIGHT + ROW_HEIGHT * len(rows) + GAP
    if not groups:
        return None
    ends = [value for each in groups for bar in each.bars for value in (bar.low, bar.value, bar.high)]
    ticks = round_ticks(min(0.0, *ends), max(0.0, *ends), count=4)
    laid = TagBars(group.scorer, is_difference, groups, (ticks[0], ticks[-1]), (), y + 18)
    return replace(laid, ticks=[(laid.x(tick), tick_label(tick)) for tick in ticks])


def _values(
    result: SuiteResult, scorer: str, tag: str, models: Sequence[str], *, is_difference: bool
) -> Mapping[str, tuple[float, float, float]]:
    """Return value and interval of each model that has them."""
    found: dict[str, tuple[float, float, float]] = {}
    for model in models:
        if is_difference:
            compared = result.against.get(model, {}).get(scorer)
            each: TagDifference | TagScore | None = compared.tags.get(tag) if compared else None
        else:
            each = result.models[model].tags.get(tag, {}).get(scorer)
        if each is not None:
            middle = each.difference if isinstance(each, TagDifference) else each.mean
            found[model] = (middle, each.low, each.high)
    return found


def _of_tag(tag: str, num_prompts: int) -> str:
    count = f" ({num_prompts:,})"
    return shortened(tag, MAX_TAG - text_width(count)) + count
