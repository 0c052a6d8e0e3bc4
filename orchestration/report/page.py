"""Report of a run, one self-contained HTML page; `report.html.j2` has the markup."""

import base64
import functools
import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jinja2
import yaml
from markupsafe import Markup
from PIL import Image

from orchestration.report.charts import curves
from orchestration.report.course import RunState
from orchestration.report.findings import held_out_change, time_left, training_speed
from orchestration.report.format import duration, moment, money, number
from orchestration.report.gallery_view import NUM_OPEN, gallery_groups
from orchestration.report.leaderboard import Leaderboard, leaderboard_of
from orchestration.report.records import ReportData
from orchestration.report.suite_view import headlines, sampling_of, suite_views
from orchestration.stages.stage import StageState

MAX_SIDE = 512  # larger samples are shown as a copy of this side, so that a page stays a few MB
MAX_GRID_SIDE = 768  # the same for a grid of samples
RELOAD_S = 60  # after which the page of a live run reloads itself


@dataclass(frozen=True)
class Picture:
    """Image as a data URI, with the size of the original."""

    uri: str
    width: int
    height: int


@functools.lru_cache(maxsize=256)
def picture(image: bytes, max_side: int) -> Picture:
    """Return an image as a data URI; one with a longer side becomes a smaller copy."""
    with Image.open(io.BytesIO(image)) as opened:
        kind, size = Image.MIME[opened.format or "PNG"], opened.size
        if max(size) > max_side:
            opened.thumbnail((max_side, max_side))
            opened.convert("RGB").save(buffer := io.BytesIO(), "JPEG", quality=90)
            kind, image = "image/jpeg", buffer.getvalue()
    return Picture(f"data:{kind};base64,{base64.b64encode(image).decode()}", *size)


def source_digest(text: str) -> str:
    """Return the name by which a content security policy allows one inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@functools.cache
def part(name: str) -> str:
    """Read a file of a page, such as its style."""
    return (Path(__file__).parent / name).read_text()


@functools.cache
def template(name: str) -> jinja2.Template:
    """Load a page's template, with filters that format numbers."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(number=number, duration=duration, moment=moment, money=money)
    return environment.get_template(name)


class Widths:
    """Widths of bars as rules of the style sheet: a strict policy allows no style in a tag."""

    def __init__(self, values: Iterable[float]) -> None:
        self._names = {float(value): f"grow-{i}" for i, value in enumerate(dict.fromkeys(map(float, values)))}

    def name(self, value: float) -> str:
        """Return the class of a bar that grows by a value."""
        return self._names[float(value)]

    def rules(self) -> str:
        """Return the rules of all these classes."""
        return "".join(f".{name} {{ flex-grow: {value:g}; }}\n" for value, name in self._names.items())


def render_report(data: ReportData, images: Mapping[str, bytes]) -> str:
    """Render the page of a run; the section of a stage that has not run (None) says so.

    Args:
        data: The run's data.
        images: Bytes of the images that samples, sample grids and contact sheet name; an absent one is shown as
            missing.
    """
    training, widths, views = data.training, _widths(data), suite_views(data.evaluation)
    css = part("page.css") + widths.rules()
    is_live = training is not None and not training.is_over
    return template("report.html.j2").render(
        vars(data),
        css=Markup(css),  # noqa: S704  # ours, and numbers
        css_digest=source_digest(css),
        grow=widths.name,
        reload_s=RELOAD_S,
        is_open=data.state not in (RunState.FINISHED, RunState.PARTIAL),
        live=is_live,
        former=_former(data),
        left_s=time_left(training) if training is not None and is_live and data.stage == "train" else None,
        created=datetime.fromisoformat(data.created_at),
        outcome=held_out_change(training),
        views=views,
        sampling=sampling_of(views),
        headlines=headlines(views),
        galleries=gallery_groups(data.evaluation),
        num_open=NUM_OPEN,
        has_leaderboard=leaderboard_of(data.evaluation) is not None,
        curves=curves(training) if training else [],
        speed=training_speed(training) if training else None,
        pictures=_pictures(data, images),
        config_yaml=yaml.safe_dump(data.config, sort_keys=False, allow_unicode=True),
    )


def render_leaderboard(data: ReportData, board: Leaderboard) -> str:
    """Render the leaderboard of a run's evaluation.

    Args:
        data: The run's data.
        board: From `leaderboard_of` of the same data.
    """
    assert data.evaluation is not None, "a leaderboard is of an evaluation"
    css, price = part("page.css"), data.config.get("report", {})
    return template("leaderboard.html.j2").render(
        name=data.name,
        created_at=data.created_at,
        created=datetime.fromisoformat(data.created_at),
        record=data.evaluation.record,
        board=board,
        is_former="samples and scores" in _former(data),
        gpu_hour_price=price.get("gpu_hour_price"),
        currency=price.get("currency"),
        versions=data.versions,
        css=Markup(css),  # noqa: S704  # ours
        css_digest=source_digest(css),
    )


def _former(data: ReportData) -> list[str]:
    """Return the results that are from an earlier training, because this one has none yet."""
    states = {stage.name: stage.status for stage in data.stages}
    ended = (StageState.DONE, StageState.UP_TO_DATE)
    is_undone = {name: states.get(name, StageState.DONE) not in ended for name in ("train", "evaluate")}
    is_undone["train"] &= data.training is not None  # a run may evaluate models without a training of its own
    found = ["training"] if is_undone["train"] and data.training and data.training.is_over else []
    return found + (["samples and scores"] if any(is_undone.values()) and data.evaluation else [])


def _pictures(data: ReportData, images: Mapping[str, bytes]) -> dict[str, Picture]:
    grids = {grid.image for grid in data.training.samples} if data.training else set()
    return {name: picture(image, MAX_GRID_SIDE if name in grids else MAX_SIDE) for name, image in images.items()}


def _widths(data: ReportData) -> Widths:
    rows = data.dataset.rows.values() if data.dataset else ()
    speeds = data.encoding.speeds if data.encoding else ()
    return Widths([*rows, *(part.share for speed in speeds for part in speed.parts)])
