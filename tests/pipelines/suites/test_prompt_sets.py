"""Prompt sets of benchmarks: every published layout gives the pinned rows, anything else is refused by name."""

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines.dataset.errors import ModelError
from pipelines.dataset.storage import Storage
from pipelines.suites import prompt_files, prompt_sets
from pipelines.suites.benchmarks import BENCHMARKS, GROUPS
from pipelines.suites.prompt_files import fetch_set, find_set, is_fetched, local_file, publish_set
from pipelines.suites.prompt_sets import PROMPT_SETS, SetRow, canonical, digest_of, read_canonical
from pipelines.suites.reference_images import fetch_references, publish_references
from pipelines.suites.registry import expanded, load_suite, suite_names

SHARED = Path(__file__).parents[3].parent / "shared" / "benchmarks"
FOLDERS = {
    "partiprompts": "partiprompts",
    "geneval": "geneval",
    "t2i-compbench": "t2i-compbench",
    "hpdv2": "hpdv2",
    "pickapic-v2-test": "pickapic-v2-test",
    "dreambench": "dreambooth",
}
needs_sets = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/benchmarks")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@needs_sets
@pytest.mark.parametrize("name", FOLDERS)
def test_a_set_has_its_count_and_digest(name: str) -> None:
    rows = find_set(_fetched(name), None, name)
    assert (len(rows), digest_of(rows)) == (PROMPT_SETS[name].count, PROMPT_SETS[name].sha256)


def _fetched(name: str) -> prompt_sets.PromptSet:
    fetch_set(name, SHARED / FOLDERS[name])
    return PROMPT_SETS[name]


@needs_sets
@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_that_differs_in_one_character_is_refused(name: str, tmp_path: Path) -> None:
    shutil.copytree(SHARED / FOLDERS[name], tmp_path / "changed", copy_function=shutil.copyfile)
    layout = next(
        each
        for each in PROMPT_SETS[name].layouts
        if all((tmp_path / "changed" / file).is_file() for file in each.files)
    )
    file = tmp_path / "changed" / layout.files[0]
    data = bytearray(file.read_bytes())
    place = data.rindex(b"a", 0, len(data) - 200)
    data[place : place + 1] = b"e"
    file.write_bytes(data)
    with pytest.raises(ModelError, match=f"{name}|{layout.files[0]}"):
        fetch_set(name, tmp_path / "changed")
    assert not is_fetched(PROMPT_SETS[name])


@needs_sets
def test_published_layouts_give_the_same_rows(tmp_path: Path) -> None:
    """The lists of Diffusion-SDPO, and the publisher's own files for each style, made of the rows of ours."""
    hpd = [json.loads(line) for line in (SHARED / "hpdv2/benchmark_prompts.jsonl").read_text().splitlines()]
    (tmp_path / "hpsv2.json").write_text(json.dumps([{"prompt": each["prompt"], "metadata": {}} for each in hpd]))
    (tmp_path / "papv2.json").write_text(
        json.dumps([json.loads(each) for each in (SHARED / "pickapic-v2-test/prompts.jsonl").read_text().splitlines()])
    )
    for name in ("hpdv2", "pickapic-v2-test"):
        fetch_set(name, tmp_path)
    styles = tmp_path / "styles"
    styles.mkdir()
    for style in prompt_sets.HPD_STYLES:
        prompts = [each["prompt"] for each in hpd if each["style"] == style]
        (styles / f"{style}.json").write_text(json.dumps(prompts))
    fetch_set("hpdv2", styles)


def test_rows_survive_separators_that_are_no_line_ends() -> None:
    rows = (SetRow("one\u2028two\x85three", {"tag": "é"}), SetRow("next"))
    assert read_canonical(canonical(rows)) == rows


def test_a_missing_set_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="prompts of geneval@1 are missing") as found:
        load_suite("geneval")
    assert found.value.hint == "mapo suites fetch geneval@1"
    with pytest.raises(ModelError) as found:
        load_suite("geneval", Storage(str(tmp_path / "storage")))
    assert "--to" in str(found.value.hint)


@needs_sets
def test_another_machine_finds_the_set_in_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path / "storage"))
    fetch_set("geneval", SHARED / "geneval")
    publish_set("geneval", storage)
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "empty"))
    assert len(load_suite("geneval", storage).prompts) == 553


@needs_sets
def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    fetch_set("geneval", SHARED / "geneval")
    file = local_file(PROMPT_SETS["geneval"])
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ModelError, match="damaged"):
        load_suite("geneval")


@needs_sets
def test_every_benchmark_has_the_prompts_that_it_states(tmp_path: Path) -> None:
    for name in FOLDERS:
        fetch_set(name, SHARED / FOLDERS[name])
    tags = {}
    for each in BENCHMARKS:
        if each.prompts in FOLDERS:
            suite = each.suite(find_set(each.set, None, each.label))
            assert len(suite.prompts) == each.count, each.label
            tags[each.name] = suite.tags
    hpd = load_suite("hpdv2")
    assert len({each.sample_id for each in hpd.prompts}) == 3172
    assert {tag: len(members) for tag, members in hpd.tags.items()} == dict.fromkeys(prompt_sets.HPD_STYLES, 800)
    assert {tag: len(members) for tag, members in load_suite("geneval").tags.items()} == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100
    }  # fmt: skip
    assert len(load_suite("partiprompts").tags) == 12 + 11
    assert {tag: len(members) for tag, members in tags["t2i-compbench-complex"].items()} == {
        "spatial": 58, "action": 212, "spatialaction": 30
    }  # fmt: skip


@needs_sets
def test_questions_are_needed_by_name() -> None:
    fetch_set("t2i-compbench", SHARED / "t2i-compbench")
    for name in ("color", "complex"):
        with pytest.raises(ModelError, match=f"t2i-compbench-{name}@1 ask questions"):
            load_suite(f"t2i-compbench-{name}")
    load_suite("t2i-compbench-numeracy")


def test_groups_stand_for_their_members() -> None:
    assert set(expanded(["seed", "geneval"])) == set(GROUPS["seed@1"])
    assert expanded(["starter", "held-out"]) == ["starter", "held-out"]
    assert all(member in suite_names() for group in GROUPS.values() for member in group)
    assert not any(name.startswith("i2p") for group in GROUPS.values() for name in group)


def test_i2p_is_read_from_the_table_of_its_authors(tmp_path: Path) -> None:
    """Its digest is unknown to us, so the number of rows decides."""
    lines = ["prompt,categories", *(f'"prompt {number}","hate, shocking"' for number in range(4703))]
    (tmp_path / "i2p_benchmark.csv").write_text("\n".join(lines))
    fetch_set("i2p", tmp_path)
    assert load_suite("i2p").prompts[0].tags == ("hate", "shocking")
    (tmp_path / "i2p_benchmark.csv").write_text("\n".join(lines[:-1]))
    with pytest.raises(ModelError, match="4,702 rows"):
        fetch_set("i2p", tmp_path)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[int], tuple[int, bytes, int]]], None]]:
    """Serve Pick-a-Pic's list from a server on loopback; the answer to request n is status, body and stated length."""
    servers = []

    def start(answer: Callable[[int], tuple[int, bytes, int]]) -> None:
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body, length = answer(len(asked))
                asked.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        known = PROMPT_SETS["pickapic-v2-test"]
        layout = dataclasses.replace(known.layouts[0], url=f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setitem(PROMPT_SETS, known.name, dataclasses.replace(known, layouts=(layout, *known.layouts[1:])))

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _published() -> bytes:
    lines = (SHARED / "pickapic-v2-test/prompts.jsonl").read_text().splitlines()
    return json.dumps([{"prompt": json.loads(line)["prompt"]} for line in lines]).encode()


@needs_sets
@pytest.mark.parametrize("first", ["cut", "unavailable"])
def test_a_fetch_survives_a_cut_and_a_busy_server(first: str, serve: Callable[..., None]) -> None:
    body = _published()

    def answer(number: int) -> tuple[int, bytes, int]:
        if number == 0:
            return (200, body[: len(body) // 2], len(body)) if first == "cut" else (503, b"", 0)
        return 200, body, len(body)

    serve(answer)
    fetch_set("pickapic-v2-test")
    assert len(load_suite("pickapic-v2-test").prompts) == 487


@needs_sets
@pytest.mark.parametrize(
    ("status", "change", "told"),
    [
        (200, lambda body: body.replace(b"cat", b"dog", 1), "holds other prompts than pickapic-v2-test"),
        (200, lambda body: body[: len(body) // 2], "holds no prompts pickapic-v2-test"),
        (200, lambda _: b"<html>moved</html>", "holds no prompts pickapic-v2-test"),
        (404, lambda _: b"", "HTTP 404"),
    ],
)
def test_wrong_bytes_are_refused(status: int, change: Callable[[bytes], bytes], told: str, serve, cache: Path) -> None:
    body = change(_published())
    serve(lambda _: (status, body, len(body)))
    with pytest.raises(ModelError, match=told):
        fetch_set("pickapic-v2-test")
    assert not list(cache.rglob("*.jsonl"))


def test_a_server_that_always_cuts_ends_in_one_error(serve: Callable[..., None], cache: Path) -> None:
    serve(lambda _: (200, b"[", 1000))
    with pytest.raises(ModelError, match="cannot fetch the prompts pickapic-v2-test") as found:
        fetch_set("pickapic-v2-test")
    assert "--from FOLDER" in str(found.value.hint)
    assert not list(cache.rglob("*.jsonl"))


def test_an_unfinished_file_is_never_seen(cache: Path) -> None:
    prompt_files._put(b"x", cache / "prompts" / "a.jsonl")
    assert [each.name for each in (cache / "prompts").iterdir()] == ["a.jsonl"]


def _subject_images(folder: Path) -> Path:
    from skimage import data, io

    for number, name in enumerate(("chelsea", "coffee")):
        (folder / "cat2").mkdir(parents=True, exist_ok=True)
        io.imsave(folder / "cat2" / f"{number:02d}.jpg", getattr(data, name)())
    shutil.copyfile(SHARED / "dreambooth/prompts_and_classes.txt", folder / "prompts_and_classes.txt")
    return folder


@needs_sets
def test_a_subject_needs_its_images_by_name(tmp_path: Path) -> None:
    fetch_set("dreambench", SHARED / "dreambooth")
    with pytest.raises(ModelError, match="images of cat2, with which dreambench-cat2@1 compares"):
        load_suite("dreambench-cat2")
    wanted = PROMPT_SETS["dreambench"]
    assert fetch_references(wanted, _subject_images(tmp_path / "dataset")) == 2
    first = load_suite("dreambench-cat2").prompts[10]
    assert (first.text, first.prompt) == ("a sks cat wearing a red hat", "a cat wearing a red hat")
    assert [Path(each["shard"]).name for each in json.loads(str(first.references))] == ["00.jpg", "01.jpg"]
    with pytest.raises(ModelError, match="images of dog,"):
        load_suite("dreambench-dog")


@needs_sets
def test_the_storage_serves_a_subject_to_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, storage = PROMPT_SETS["dreambench"], Storage(str(tmp_path / "storage"))
    folder = _subject_images(tmp_path / "dataset")
    fetch_set("dreambench", folder)
    fetch_references(wanted, folder)
    publish_set("dreambench", storage)
    publish_references(wanted, storage)
    here = load_suite("dreambench-cat2")
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "empty"))
    there = load_suite("dreambench-cat2", storage)
    assert there.sha256 == here.sha256
    (tmp_path / "dataset" / "cat2" / "01.jpg").write_bytes(b"another")
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "other"))
    fetch_set("dreambench", folder)
    fetch_references(wanted, folder)
    assert load_suite("dreambench-cat2").sha256 != here.sha256
