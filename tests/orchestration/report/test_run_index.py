"""The index of runs: complete, untorn, escaped, sortable, and two of its runs compared in a real browser."""

import json
import math
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from browser import CONTRAST, look, needs_chromium
from hypothesis import given
from hypothesis import strategies as st
from report_sample import Page, changed, sample_data, sample_images

from orchestration.report.index import INDEX, SUMMARY, differing, in_script, read_summaries, render_index, write_index
from orchestration.report.records import Interval
from orchestration.report.summary import MAX_LINE, RunSummary, settings, summary_of
from pipelines.dataset.storage import Storage

HOSTILE = '"><script>alert(1)</script><!--'


OF_A_RUN = summary_of(sample_data(200))


def summary(run: str, **changes: Any) -> RunSummary:
    return replace(OF_A_RUN, run=run, **changes)


def listed(storage: Storage) -> list[str]:
    page = storage.read(INDEX).decode()
    return re.findall(r'<th scope="row" data-sort="([^"]*)"', page)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with the pages and samples of two runs, and a third that has failed."""
    folder = tmp_path_factory.mktemp("runs")
    storage = Storage(str(folder))
    first, second = summary("photos"), summary("style", started_at="2026-11-24T20:00:00Z", steps=2000, max_steps=2000)
    second = changed(second, {"settings": dict(second.settings) | {"train.loss.beta": "32.0"}})
    second = changed(second, {"scores.0.aligned": Interval(low=0.4, mean=0.45, high=0.5)})
    failed = summary(
        "broken", state="failed", stage="train", scores=[], accuracy=None, steps=310, curves={}, samples=[]
    )
    for each in (first, second, failed):
        write_index(storage, each)
        for name, image in sample_images().items():
            if name.startswith("held-out"):
                storage.write(f"runs/{each.run}/evaluation/{name}", image)
    return folder


def test_all_runs_are_listed_newest_first(storage: Storage) -> None:
    for day, name in enumerate(("b", "c", "a"), start=1):
        write_index(storage, summary(name, started_at=f"2026-11-{day:02}T00:00:00Z"))
    assert listed(storage) == ["a", "c", "b"]


def test_runs_that_end_at_the_same_time_are_all_in_the_index(storage: Storage) -> None:
    start, names = threading.Barrier(6), [f"run-{i}" for i in range(6)]

    def finish(name: str) -> None:
        start.wait()
        write_index(storage, summary(name))

    threads = [threading.Thread(target=finish, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(listed(storage)) == names


def test_a_run_that_wrote_while_the_index_was_composed_is_not_lost(storage: Storage, monkeypatch) -> None:
    write = Storage.write

    def late(self: Storage, name: str, data: bytes) -> None:
        if name == INDEX and not self.exists("runs/late/report/summary.json"):
            write(self, f"runs/late/{SUMMARY}", json.dumps(summary("late").to_json()).encode())
        write(self, name, data)

    monkeypatch.setattr(Storage, "write", late)
    write_index(storage, summary("early"))
    assert sorted(listed(storage)) == ["early", "late"]


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"version": 99, "run": "bad"}', b"\xff"])
def test_a_damaged_summary_costs_only_its_own_row(storage: Storage, damage: bytes) -> None:
    storage.write(f"runs/bad/{SUMMARY}", damage)
    write_index(storage, summary("good"))
    assert listed(storage) == ["good"]


def test_a_summary_of_an_earlier_version_is_read_as_it_was_written(storage: Storage) -> None:
    """The shape is on users' storages: what the version of November 2026 wrote, spelled out."""
    ends = {"mean": 0.5, "low": 0.4, "high": 0.6}
    old = {
        "version": 1, "run": "old", "written_at": "2026-11-20T10:00:00Z", "state": "finished", "stage": None,
        "started_at": "2026-11-20T09:00:00Z", "ended_at": "2026-11-20T10:00:00Z", "method": "mapo", "steps": 10,
        "max_steps": 20, "rounds": 1, "table_version": 3, "rows": 9, "kept": 8,
        "accuracy": {"before": ends, "after": ends}, "scores": [{"name": "style", "base": ends, "aligned": ends}],
        "cost": {"gpu_hours": 1.0, "cpu_hours": 0.0, "price": {"amount": 2.5, "hour": 2.5, "currency": "EUR"}},
        "settings": {"seed": "0"}, "curves": {"loss": {"line": [[1, 0.5]], "marks": []}},
        "samples": [{"prompt": "a cat", "seed": 17, "base": "base-000.png", "aligned": "aligned-000.png"}],
    }  # fmt: skip
    storage.write(f"runs/old/{SUMMARY}", json.dumps(old).encode())
    (found,) = read_summaries(storage)
    assert json.loads(json.dumps(found.to_json())) == old
    write_index(storage, summary("new"))
    assert sorted(listed(storage)) == ["new", "old"]


def test_a_run_that_was_deleted_leaves_the_index(storage: Storage) -> None:
    write_index(storage, summary("gone"))
    storage.delete(f"runs/gone/{SUMMARY}")
    write_index(storage, summary("kept"))
    assert listed(storage) == ["kept"]


def test_runs_on_object_storage_are_found(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("runs-of-the-index")
    storage = Storage("s3://runs-of-the-index/deep/er")
    for name in ("one", "two"):
        storage.write(f"runs/{name}/checkpoints/x/y", b"never listed")
        write_index(storage, summary(name))
    assert sorted(each.run for each in read_summaries(storage)) == ["one", "two"]
    assert sorted(listed(storage)) == ["one", "two"]


def test_text_of_a_run_is_never_markup() -> None:
    data = summary(HOSTILE, method=HOSTILE, stage=HOSTILE, state=HOSTILE)
    data = changed(data, {"scores.0.name": HOSTILE, "samples.0.prompt": HOSTILE, "settings": {"seed": HOSTILE}})
    page = render_index([data, summary("other")], HOSTILE)
    parsed = Page(page)
    assert parsed.tags.count("script") == 2
    assert "alert(1)</script><!--" not in page
    assert parsed.addresses.count("%22%3E%3Cscript%3Ealert%281%29%3C/script%3E%3C%21--/report/index.html") == 1
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@hypothesis.settings(max_examples=50, deadline=None)
@given(json_values)
def test_data_survives_the_script_element_unchanged(value: Any) -> None:
    text = in_script(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028\u2029") & set(text)


@hypothesis.settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(min_size=1), json_values, max_size=4))
def test_two_configurations_differ_exactly_where_their_settings_do(config: dict[str, Any]) -> None:
    found = dict(settings(config))
    assert differing([found, found]) == []
    assert differing([found, {**found, "new.key": "1"}]) == ["new.key"]


def test_a_summary_is_small_and_every_number_finite() -> None:
    style = "evaluation.record.results.suites.held-out.models.base.scores.style.mean"
    broken = {"training.history.7.loss": math.nan, style: math.inf}
    made = summary_of(changed(sample_data(2000), broken)).to_json()
    assert len(json.dumps(made, allow_nan=False)) < 16_000
    assert all(len(curve["line"]) <= MAX_LINE for curve in made["curves"].values())
    assert [score["name"] for score in made["scores"]] == [
        "held-out: content", "held-out: dark_share", "own: style", "own: content", "own: dark_share",
    ]  # fmt: skip


def test_a_run_whose_end_is_unknown_has_none_in_the_index() -> None:
    ended = {state: summary_of(replace(sample_data(200), state=state)).ended_at for state in ("finished", "lost")}
    assert ended == {"finished": "2026-11-23T23:10:00Z", "lost": None}


def test_two_hundred_runs_take_less_than_two_seconds_and_five_megabytes(storage: Storage) -> None:
    for i in range(200):
        each = summary(f"run-{i:03}", started_at=f"2026-11-01T00:{i % 60:02}:00Z")
        each = replace(each, settings={**each.settings, "seed": str(i), "train.learning_rate": str(i)})
        storage.write(f"runs/run-{i:03}/{SUMMARY}", json.dumps(each.to_json()).encode())
    taken = []
    for _ in range(3):  # a busy machine is slow now and then
        started = time.process_time()
        write_index(storage, summary("last"))
        taken.append(time.process_time() - started)
    assert min(taken) < 2
    assert len(storage.read(INDEX)) < 5_000_000
    assert len(listed(storage)) == 201


@needs_chromium
@pytest.mark.parametrize("over_http", [True, False])
def test_two_runs_are_compared_in_a_browser(two_runs: Path, over_http: bool) -> None:
    script = """const part = doc.getElementById('comparison'), images = [...part.querySelectorAll('img')]
        images.forEach(image => image.loading = 'eager')
        return JSON.stringify({text: part.innerText, paths: part.querySelectorAll('path.line').length,
            images: images.length, shown: images.filter(i => i.complete && i.naturalWidth).length,
            sideways: doc.documentElement.scrollWidth - doc.documentElement.clientWidth,
            picks: [...doc.querySelectorAll('select')].map(s => s.value)})"""
    seen = look(two_runs, "runs/index.html#one=photos&other=style", script, over_http=over_http)
    found = json.loads(seen.text.replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    assert seen.console == []
    assert found["picks"] == ["photos", "style"]
    assert found["sideways"] == 0
    assert found["paths"] == 2 + 4 * 2  # the legend's, and two lines a chart
    assert found["images"] == 24
    assert found["shown"] > 0
    text = re.sub(r"\s+", " ", found["text"])
    assert "train.loss.beta 8.0 32.0" in text
    assert "held-out: style, aligned 0.328 0.301 to 0.354 0.450 0.400 to 0.500" in text


@needs_chromium
def test_the_table_can_be_sorted_with_the_keyboard(two_runs: Path) -> None:
    script = """const runs = () => [...doc.querySelectorAll('#table tbody th')].map(th => th.innerText).join(' ')
        const button = [...doc.querySelectorAll('#table thead button')].find(b => b.textContent === 'Steps')
        const before = runs(); button.focus()
        const focused = doc.activeElement === button; button.click(); const down = runs(); button.click()
        return [before, focused, down, runs(), button.parentElement.getAttribute('aria-sort')].join(' | ')"""
    seen = look(two_runs, "runs/index.html", script)
    assert seen.text.split(" | ")[1:] == ["true", "style broken photos", "photos broken style", "ascending"]
    assert seen.console == []


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_all_text_of_the_index_has_aa_contrast(two_runs: Path, dark: bool) -> None:
    seen = look(two_runs, "runs/index.html#one=photos&other=style", CONTRAST, width=1280, dark=dark)
    assert float(seen.text.split()[0]) >= 4.5, seen.text
