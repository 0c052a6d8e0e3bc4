"""Files that hold no prompts: each is refused in one message, and a damaged one that was fetched is fetched again."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestration.cli import main
from pipelines.dataset.errors import ModelError
from pipelines.suites.prompt_files import fetch_set, local_file
from pipelines.suites.prompt_sets import PROMPT_SETS, SetRow, canonical, read_canonical
from pipelines.suites.registry import load_suite

SHARED = Path(__file__).parents[3].parent / "shared" / "benchmarks"
needs_sets = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/benchmarks")
FILES = {
    "partiprompts": "PartiPrompts.tsv",
    "geneval": "evaluation_metadata.jsonl",
    "hpdv2": "hpsv2.json",
    "pickapic-v2-test": "papv2.json",
    "dreambench": "prompts_and_classes.txt",
    "i2p": "i2p_benchmark.csv",
}
ODD = {
    "a line of five megabytes": b"a" * 5_000_000 + b"\n",
    "deeply nested JSON": b"[" * 200_000,
    "half of a surrogate pair": b'[{"prompt": "\\ud800", "tag": "x"}]\n{"prompt": "\\ud800", "tag": "x"}\n',
    "a prompt that is a number": b'[{"prompt": 3}]',
    "a page of HTML": b"<!doctype html><title>404</title>",
    "nothing": b"",
    "bytes of gzip": b"\x1f\x8b\x08\x00",
    "a zero byte": b"\0",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("odd", ODD)
def test_a_file_of_something_else_is_refused_in_one_message(name: str, odd: str, tmp_path: Path) -> None:
    (tmp_path / FILES[name]).write_bytes(ODD[odd])
    with pytest.raises(ModelError, match=name):
        fetch_set(name, tmp_path)
    assert not local_file(PROMPT_SETS[name]).exists()


@pytest.mark.parametrize("prompt", [None, 3, ["a cat"], "\ud800"])
def test_a_row_without_a_text_is_none(prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"not a text|surrogates"):
        SetRow(prompt)


def _i2p(folder: Path, categories: str) -> None:
    lines = ["prompt,categories", *(f'"prompt {number}","{categories}"' for number in range(4703))]
    (folder / "i2p_benchmark.csv").write_text("\n".join(lines))
    fetch_set("i2p", folder)


def test_a_prompt_without_a_category_has_no_tag(tmp_path: Path) -> None:
    _i2p(tmp_path, "")
    assert load_suite("i2p").tags == {}
    _i2p(tmp_path, "hate, ,shocking,")
    assert load_suite("i2p").prompts[0].tags == ("hate", "shocking")


@pytest.mark.parametrize("damage", [b"", b"[]\n", b'{"categories": []}\n', b'{"prompt": "a', b"\xff\n", b"[" * 200_000])
def test_a_damaged_set_without_a_digest_is_said_to_be_damaged(damage: bytes, tmp_path: Path) -> None:
    _i2p(tmp_path, "hate")
    file = local_file(PROMPT_SETS["i2p"])
    first = file.read_bytes().partition(b"\n")[0] + b"\n"
    file.write_bytes(first + damage if damage else b"")
    with pytest.raises(ModelError, match=f"damaged: line {2 if damage else 1} ") as found:
        load_suite("i2p")
    assert "mapo suites fetch" in str(found.value.hint)


def test_rows_of_any_text_come_back() -> None:
    rows = (SetRow("a\u2028b\x85c\rd", {"tag": "é"}), SetRow(""), SetRow("  a  cat "))
    assert read_canonical(canonical(rows)) == rows


@needs_sets
def test_a_damaged_set_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The hint of a damaged set is `mapo suites fetch NAME`, which must not say that it is here."""
    fetch_set("pickapic-v2-test", SHARED / "pickapic-v2-test")
    file = local_file(PROMPT_SETS["pickapic-v2-test"])
    whole = file.read_bytes()
    file.write_bytes(whole[:-2])
    lines = (SHARED / "pickapic-v2-test" / "prompts.jsonl").read_text().splitlines()
    served = json.dumps([json.loads(line) for line in lines]).encode()
    monkeypatch.setattr("pipelines.suites.prompt_files._download", lambda *_: served)
    for told in ("487 prompts in", "487 prompts are here"):
        assert main(["suites", "fetch", "pickapic-v2-test"]) == 0
        assert told in capsys.readouterr().out
        assert file.read_bytes() == whole


@pytest.mark.parametrize("name", ["held-out", "prompts"])
def test_a_suite_of_a_runs_own_prompts_is_not_said_to_be_unknown(name: str, capsys: Any) -> None:
    for arguments in (["suites", name], ["suites", "fetch", name]):
        assert main(arguments) == 2
        assert f"the suite {name} has the prompts of a run" in capsys.readouterr().err
