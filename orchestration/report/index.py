"""The index of all runs of a storage, `runs/index.html`: composed of each run's summary, whole or not at all.

Every run writes its own summary and then the index. Of several that do so at once, the last to write has them all: it
looks again after its write, and any other's summary that came later is followed by that other's own write.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from orchestration.report.page import DASH, number, part, source_digest, template
from orchestration.report.summary import CURVES, VERSION
from pipelines.dataset.errors import MapoError
from pipelines.dataset.layout import RUNS
from pipelines.dataset.secrets import redact
from pipelines.dataset.storage import Storage

INDEX = f"{RUNS}/index.html"
SUMMARY = "report/summary.json"
NUM_READERS = 16
MAX_LOOKS = 5  # after a write; each beyond the first needs another run that wrote at that very moment
NEWEST_FIRST = "0"

Summary = dict[str, Any]


def write_index(storage: Storage, summary: Summary, *, may_write: Callable[[], bool] = lambda: True) -> str:
    """Write one run's summary, and the index of all; returns the index's name.

    Args:
        storage: Of the runs.
        summary: From `orchestration.report.summary.summary_of`.
        may_write: Asked before every write; nothing more is written once it says no.
    """
    text = redact(json.dumps(summary, allow_nan=False, ensure_ascii=False))
    if not may_write():
        return INDEX
    storage.write(f"{RUNS}/{summary['run']}/{SUMMARY}", text.encode())
    written = ""
    for _ in range(MAX_LOOKS):
        page = render_index(read_summaries(storage), storage.url)
        if page == written or not may_write():
            break
        storage.write(INDEX, page.encode())
        written = page
    return INDEX


def read_summaries(storage: Storage) -> list[Summary]:
    """The summaries of all runs, by name; runs without one, and ones that cannot be read, are left out."""
    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="summaries") as readers:
        found = readers.map(lambda name: _read(storage, name), run_names(storage))
        return [summary for summary in found if summary is not None]


def run_names(storage: Storage) -> list[str]:
    """The folders below `runs/`, sorted: one listing, whatever lies in them."""
    try:
        found = storage.fs.ls(storage.path(RUNS), detail=True)
    except FileNotFoundError:
        return []
    return sorted(str(each["name"]).rstrip("/").rpartition("/")[2] for each in found if each["type"] == "directory")


def _read(storage: Storage, name: str) -> Summary | None:
    try:
        summary = json.loads(storage.read(f"{RUNS}/{name}/{SUMMARY}"))
        if summary["version"] != VERSION or summary["run"] != name:
            return None
        row_of(summary)
    except (MapoError, ValueError, KeyError, TypeError, AttributeError):
        return None
    else:
        found: Summary = summary
        return found


def render_index(summaries: Sequence[Summary], storage_url: str) -> str:
    """The page: a table that needs no script, and the data by which its script sorts and compares.

    Args:
        summaries: Of all runs.
        storage_url: Where they are.
    """
    newest = sorted(summaries, key=lambda each: (each["started_at"] or NEWEST_FIRST, each["run"]), reverse=True)
    css, script = part("page.css"), part("index.js")
    return template("index.html.j2").render(
        storage=redact(storage_url),
        rows=[row_of(each) for each in newest],
        written_at=max((each["written_at"] for each in summaries), default=None),
        css=Markup(css),  # noqa: S704  # ours
        css_digest=source_digest(css),
        script=Markup(script),  # noqa: S704  # ours
        script_digest=source_digest(script),
        data=Markup(in_script(compared(newest))),  # noqa: S704  # escaped by `in_script`
    )


def row_of(summary: Summary) -> dict[str, Any]:
    """What the table shows of a run: for each column its text and the number that sorts it."""
    accuracy, cost = summary["accuracy"], summary["cost"]
    gain = accuracy["after"]["mean"] - accuracy["before"]["mean"] if accuracy else None
    hours, kind = (cost["gpu_hours"], "GPU") if cost["gpu_hours"] else (cost["cpu_hours"], "CPU")
    price = cost["price"]
    return {
        "run": summary["run"],
        "link": f"{quote(summary['run'])}/report/index.html",
        "state": summary["state"],
        "stage": summary["stage"],
        "method": summary["method"] or DASH,
        "rounds": int(summary["rounds"]),
        "steps": int(summary["steps"]),
        "max_steps": int(summary["max_steps"]),
        "table_version": summary["table_version"],
        "kept": int(summary["kept"]),
        "rows": int(summary["rows"]),
        "before": accuracy and float(accuracy["before"]["mean"]),
        "after": accuracy and float(accuracy["after"]["mean"]),
        "low": accuracy and float(accuracy["after"]["low"]),
        "high": accuracy and float(accuracy["after"]["high"]),
        "gain": gain,
        "scores": [
            {"name": each["name"], "base": number(each["base"]["mean"]), "aligned": number(each["aligned"]["mean"])}
            for each in summary["scores"]
        ],
        "hours": float(hours),
        "hours_text": f"{number(hours)} {kind} h" if hours else DASH,
        "price": f"{price['amount']:,.2f} {price['currency']}" if price else None,
        "started": _time(summary["started_at"]),
        "ended": _time(summary["ended_at"]),
    }


def _time(text: str | None) -> dict[str, str] | None:
    return None if text is None else {"iso": text, "text": datetime.fromisoformat(text).strftime("%-d %b %Y, %H:%M")}


def compared(summaries: Sequence[Summary]) -> dict[str, Any]:
    """What two runs can be compared by; of the settings only those that are not the same in all runs."""
    kept = ("run", "state", "accuracy", "scores", "curves", "samples")
    different = differing([each["settings"] for each in summaries])
    return {
        "titles": CURVES,
        "settings": different,
        "runs": [
            {name: each[name] for name in kept} | {"values": [each["settings"].get(key) for key in different]}
            for each in summaries
        ],
    }


def differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys whose value is not the same everywhere, sorted."""
    keys = {key for each in settings for key in each}
    return sorted(key for key in keys if len({each.get(key) for each in settings}) > 1)


def in_script(data: Any) -> str:
    """Plain data as JSON that can stand in a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
