"""`mapo suites`: what exists, what is here, and fetching."""

import json
import shutil
from pathlib import Path

import pytest

from orchestration.cli import main
from pipelines.dataset.storage import Storage
from pipelines.suites.registry import load_suite

SHARED = Path(__file__).parents[3].parent / "shared" / "benchmarks"
needs_sets = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/benchmarks")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "cache"))


def test_the_list_has_every_suite_and_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suites"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[0]: line for line in lines if "@" in line}
    names = {
        "starter@1", "pickapic-v2-test@1", "hpdv2@1", "partiprompts@1", "geneval@1", "t2i-compbench@1", "dreambench@1",
        "i2p@1", "quick@1", "seed@1",
    }  # fmt: skip
    assert names <= found.keys()
    assert " here " in found["starter@1"]
    assert "not here" in found["geneval@1"]


@pytest.mark.parametrize("name", ["geneval", "geneval@1", "seed", "t2i-compbench-color", "starter"])
def test_one_suite_is_described_in_words_and_as_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suites", name]) == 0
    text = capsys.readouterr().out
    assert main(["suites", name, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert text.startswith(found["name"])
    assert all(each in text for each in (*found["scorers"], *found["differs"], found["licence"]))
    assert found["num_prompts"] > 0


def test_an_unknown_suite_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["suites", "nothing"], ["suites", "fetch", "nothing"]):
        assert main(arguments) == 2
        assert "there is no suite nothing\nhint: choose from held-out" in capsys.readouterr().err


@needs_sets
def test_prompts_are_fetched_from_a_folder_to_the_storage(tmp_path: Path, capsys, monkeypatch) -> None:
    storage = str(tmp_path / "storage")
    assert main(["suites", "fetch", "geneval", "--from", str(SHARED / "geneval"), "--to", storage]) == 0
    assert "553 prompts" in capsys.readouterr().out
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "empty"))
    assert len(load_suite("geneval", Storage(storage)).prompts) == 553


@needs_sets
def test_questions_beside_the_prompts_come_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "compbench"
    shutil.copytree(SHARED / "t2i-compbench", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    prompts = (folder / "color_val.txt").read_text().split("\n")
    lines = [
        {"parser": "a test"},
        *({"prompt": each.strip(), "questions": ["red?"]} for each in prompts if each.strip()),
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["suites", "fetch", "t2i-compbench", "--from", str(folder)]) == 0
    suite = load_suite("t2i-compbench-color")
    assert {each.questions for each in suite.prompts} == {'["red?"]'}
    assert "Questions by a test." in suite.differs
    assert main(["suites", "fetch", "t2i-compbench-color"]) == 0
    assert "are here" in capsys.readouterr().out


@needs_sets
def test_questions_about_a_foreign_prompt_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "compbench"
    shutil.copytree(SHARED / "t2i-compbench", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    lines = [{"parser": "a test"}, {"prompt": "a green bench and a blue bowlx", "questions": ["red?"]}]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["suites", "fetch", "t2i-compbench", "--from", str(folder)]) == 1
    assert "have questions about 1" in capsys.readouterr().err
