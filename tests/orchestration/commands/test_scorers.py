"""`mapo scorers`: what there is and whether it is here; fetched from a folder; checked against published values."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from scorer_twins import CLIP_TOKENIZER, clip_model, formula_image

from orchestration.cli import completed, main
from pipelines.dataset.storage import Storage
from pipelines.scores import golden
from pipelines.scores.golden import GOLDEN, Golden, PublishedValue
from pipelines.scores.scorers import Score, new_scorer, scorer_names


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """The published files of PickScore, tiny, in one folder."""
    if not CLIP_TOKENIZER.is_dir():
        pytest.skip("CLIP's tokenizer is not on this machine")
    folder = tmp_path / "given"
    folder.mkdir()
    model = clip_model("gelu")
    save_file(
        {name: each.contiguous().clone() for name, each in model.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((CLIP_TOKENIZER / name).read_bytes())
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main([str(each) for each in arguments])
    out, errors = capsys.readouterr()
    return code, out, errors


def test_the_second_word_may_be_left_out() -> None:
    assert completed(["scorers"]) == ["scorers", "show"]
    assert completed(["scorers", "pickscore", "--json"]) == ["scorers", "show", "pickscore", "--json"]
    assert completed(["scorers", "--json"]) == ["scorers", "show", "--json"]
    for same in (["scorers", "fetch", "x"], ["scorers", "check"], ["scorers", "--help"], ["data", "show", "x"], []):
        assert completed(same) == same


def test_every_scorer_is_listed_with_its_licence_and_whether_it_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "scorers")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[: len(scorer_names())]] == scorer_names()
    code, out, _ = run(capsys, "scorers", "--json")
    found: Sequence[dict[str, Any]] = json.loads(out)
    assert [each["name"] for each in found] == scorer_names()
    assert {each["licence"] for each in found if each["parts"]} == {"MIT", "Apache-2.0", "BSD-3-Clause"}
    assert all(each["measures"] and each["scale"] for each in found)
    assert [each["name"] for each in found if each["published"]] == [name for name in scorer_names() if name in GOLDEN]
    code, out, _ = run(capsys, "scorers", "hpsv2.1")
    assert code == 0
    for part in ("Apache-2.0", "xswu/HPSv2", "not on this machine", "not verified", "mapo scorers fetch hpsv2.1"):
        assert part in out
    code, _, errors = run(capsys, "scorers", "no-such")
    assert code == 2
    assert "hint: choose from pickscore" in errors


def test_weights_are_fetched_from_a_folder_and_copied_to_a_storage(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = Storage(str(tmp_path / "storage"))
    code, out, errors = run(capsys, "scorers", "fetch", "pickscore", "--from", given, "--to", storage.url)
    assert code == 0, errors
    assert "pickscore-v1: " in out
    code, out, _ = run(capsys, "scorers", "pickscore", "--json")
    assert json.loads(out)[0]["is_cached"] is True
    record = json.loads(storage.read("cache/scorers/pickscore-v1.json"))
    assert record["licence"] == "MIT"
    assert record["sources"][0]["from"].startswith(str(given))
    for file in record["files"].values():
        assert hashlib.sha256(storage.read(f"cache/{file['sha256']}")).hexdigest() == file["sha256"]
    code, out, _ = run(capsys, "scorers", "fetch", "saturation")
    assert (code, out) == (0, "saturation needs no weights\n")
    code, _, errors = run(capsys, "scorers", "fetch", "imagereward", "--from", tmp_path / "nowhere")
    assert code == 1
    assert "hint: " in errors


def test_a_check_says_what_is_not_verified_and_records_what_is(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(capsys, "scorers", "check")
    assert code == 0
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert lines["aesthetic"] == "not verified against a published value"
    assert lines["imagereward"].startswith("not verified against a published value; THUDM/ImageReward, README.md")
    run(capsys, "scorers", "fetch", "pickscore", "--from", given)
    images = tmp_path / "images"
    images.mkdir()
    formula_image(64, 64, 1).save(images / "one.png")
    scorer = new_scorer("pickscore")
    scorer.load()
    (score,) = scorer.score([formula_image(64, 64, 1)], ["a cat"])
    assert isinstance(score, Score)
    value = PublishedValue("one.png", round(score.value, 2))
    monkeypatch.setitem(golden.GOLDEN, "pickscore", Golden("a page", "a repository", "a cat", (value,), 0.01))
    code, out, _ = run(capsys, "scorers", "check", "pickscore")
    assert out == "pickscore: not verified against a published value; a page has some, for the images in a repository\n"
    code, _, errors = run(capsys, "scorers", "check", "pickscore", "--images", tmp_path)
    assert code == 1
    assert "lacks one.png" in errors
    code, out, errors = run(capsys, "scorers", "check", "pickscore", "--images", images)
    assert (code, errors) == (0, "")
    assert "pickscore: verified against a page" in out
    code, out, _ = run(capsys, "scorers", "pickscore")
    assert "verified against a page" in out
    formula_image(64, 64, 2).save(images / "one.png")
    code, _, errors = run(capsys, "scorers", "check", "--images", images)
    assert code == 1
    assert "pickscore differs from its published values by more than 0.01" in errors
    assert "hint: are these the images in a repository?" in errors
    code, out, _ = run(capsys, "scorers", "pickscore")
    assert "not verified" in out, "a check that fails takes the earlier one back"
