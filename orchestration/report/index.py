"""Index of all runs of a storage, `runs/index.html`: composed of each run's summary, whole or not at all.

Every run writes its own summary and then the index. If several do so at once, the last one to write has them all: it
looks again after its write, and any summary that comes later is followed by its own run's write.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from orchestration.report.format import DASH, money, number
from orchestration.report.page import part, source_digest, template
from orchestration.report.summary import CURVES, RunSummary
from pipelines.dataset.errors import MapoError
from pipelines.dataset.layout import RUNS
from pipelines.dataset.secrets import redact
from pipelines.dataset.storage import Storage

INDEX = f"{RUNS}/index.html"
SUMMARY = "report/summary.json"
NUM_READERS = 16
MAX_LOOKS = 5  # after a write; each beyond the first needs another run that wrote at that very moment
NEWEST_FIRST = "0"
COMPARED = ("run", "state", "accuracy", "scores", "curves", "samples")


@dataclass(frozen=True)
class When:
    """Time as ISO text, by which the table sorts, and as a person writes it."""

    iso: str
    text: str


@dataclass(frozen=True)
class IndexRow:
    """Run as the table of the index shows it.

    Args:
        summary: The run's summary.
        link: Relative address of its page.
        hours: Device hours: of GPUs if there are any, else of CPUs.
        hours_text: The same with the unit.
        price: Price with its currency.
        started: When it started.
        ended: When it ended.
    """

    summary: RunSummary
    link: str
    hours: float
    hours_text: str
    price: str | None
    started: When | None
    ended: When | None


def write_index(storage: Storage, summary: RunSummary, *, may_write: Callable[[], bool] = lambda: True) -> str:
    """Write the summary of one run, then the index of all; return the index's name.

    Args:
        storage: The storage of the runs.
        summary: See `orchestration.report.summary.summary_of`.
        may_write: Asked before every write; nothing more is written once it says no.
    """
    text = redact(json.dumps(summary.to_json(), allow_nan=False, ensure_ascii=False))
    if not may_write():
        return INDEX
    storage.write(f"{RUNS}/{summary.run}/{SUMMARY}", text.encode())
    written = ""
    for _ in range(MAX_LOOKS):
        page = render_index(read_summaries(storage), storage.url)
        if page == written or not may_write():
            break
        storage.write(INDEX, page.encode())
        written = page
    return INDEX


def read_summaries(storage: Storage) -> list[RunSummary]:
    """Read the summaries of all runs, by name; runs without one and unreadable ones are left out."""
    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="summaries") as readers:
        found = readers.map(lambda name: _read(storage, name), run_names(storage))
        return [summary for summary in found if summary is not None]


def run_names(storage: Storage) -> list[str]:
    """Return the folders below `runs/`, sorted: one listing, whatever lies in them."""
    try:
        found = storage.fs.ls(storage.path(RUNS), detail=True)
    except FileNotFoundError:
        return []
    return sorted(str(each["name"]).rstrip("/").rpartition("/")[2] for each in found if each["type"] == "directory")


def _read(storage: Storage, name: str) -> RunSummary | None:
    try:
        summary = RunSummary.from_json(json.loads(storage.read(f"{RUNS}/{name}/{SUMMARY}")))
        row_of(summary)
    except (MapoError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return summary if summary.run == name else None


def render_index(summaries: Sequence[RunSummary], storage_url: str) -> str:
    """Render the page: a table that needs no script, and the data by which its script sorts and compares.

    Args:
        summaries: The summaries of all runs.
        storage_url: URL of their storage.
    """
    newest = sorted(summaries, key=lambda each: (each.started_at or NEWEST_FIRST, each.run), reverse=True)
    css, script = part("page.css"), part("index.js")
    return template("index.html.j2").render(
        storage=redact(storage_url),
        rows=[row_of(each) for each in newest],
        written_at=max((each.written_at for each in summaries), default=None),
        css=Markup(css),  # noqa: S704  # ours
        css_digest=source_digest(css),
        script=Markup(script),  # noqa: S704  # ours
        script_digest=source_digest(script),
        data=Markup(in_script(compared(newest))),  # noqa: S704  # escaped by `in_script`
    )


def row_of(summary: RunSummary) -> IndexRow:
    """Return what the table shows of a run."""
    cost = summary.cost
    hours, kind = (cost.gpu_hours, "GPU") if cost.gpu_hours else (cost.cpu_hours, "CPU")
    return IndexRow(
        summary=summary,
        link=f"{quote(summary.run)}/report/index.html",
        hours=hours,
        hours_text=f"{number(hours)} {kind} h" if hours else DASH,
        price=f"{money(cost.price.amount)} {cost.price.currency}" if cost.price else None,
        started=_when(summary.started_at),
        ended=_when(summary.ended_at),
    )


def _when(text: str | None) -> When | None:
    return None if text is None else When(text, datetime.fromisoformat(text).strftime("%-d %b %Y, %H:%M"))


def compared(summaries: Sequence[RunSummary]) -> dict[str, Any]:
    """Return what two runs can be compared by; of the settings only those that are not the same in all runs."""
    different = differing([each.settings for each in summaries])
    runs = []
    for each in summaries:
        content = each.to_json()
        values = [each.settings.get(key) for key in different]
        runs.append({name: content[name] for name in COMPARED} | {"values": values})
    return {"titles": CURVES, "settings": different, "runs": runs}


def differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the keys whose value is not the same everywhere, sorted."""
    keys = {key for each in settings for key in each}
    return sorted(key for key in keys if len({each.get(key) for each in settings}) > 1)


def in_script(data: object) -> str:
    """Return plain data as JSON for a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
