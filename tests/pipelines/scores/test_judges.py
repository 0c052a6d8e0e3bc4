"""Judges are checked before any work, and a fingerprint covers all that shapes a score."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from safetensors.torch import load_file, save_file
from scored_images import formula_files, pairs_to_fit, write_images

from pipelines.config import ScorerEntry
from pipelines.dataset.errors import ConfigError, ModelError
from pipelines.dataset.storage import Storage
from pipelines.scores.fit import FitPairs
from pipelines.scores.judges import prepare_judges

FITTED = ScorerEntry(name="scored_images:Lightness")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fit(storage: Storage) -> FitPairs:
    return pairs_to_fit(write_images(storage, "fit", formula_files(6), ["a"] * 6))


def test_missing_weights_are_refused_before_work(storage: Storage, empty_cache: Path) -> None:
    with pytest.raises(ModelError) as caught:
        prepare_judges([ScorerEntry(name="saturation"), ScorerEntry(name="pickscore")], storage)
    assert "pickscore-v1, clip-tokenizer not found in" in caught.value.message
    assert str(empty_cache) in caught.value.message
    assert storage.url in caught.value.message
    assert caught.value.hint
    assert caught.value.hint.startswith(f"mapo scorers fetch pickscore --to {storage.url}")
    with pytest.raises(ModelError, match="there is no folder"):
        prepare_judges([ScorerEntry(name="pickscore", weights="/nowhere")], storage)


def test_unknown_names_twins_and_needs_are_refused(storage: Storage, fit: FitPairs) -> None:
    with pytest.raises(ConfigError, match="there is no scorer pikscore"):
        prepare_judges([ScorerEntry(name="pikscore")], storage)
    twice = [ScorerEntry(name="saturation"), ScorerEntry(name="pipelines.scores.scorers.pixels:Saturation")]
    with pytest.raises(ConfigError, match="are both called saturation"):
        prepare_judges(twice, storage)
    with pytest.raises(ConfigError, match="near_duplicates needs siblings, which these images do not have"):
        prepare_judges([ScorerEntry(name="near_duplicates")], storage, provided=("image", "prompt"))
    with pytest.raises(ConfigError, match="odd needs moonlight, which nothing provides"):
        prepare_judges([ScorerEntry(name="test_needs:Odd")], storage, fit_on=fit)
    for none in (None, FitPairs(fit.table.slice(0, 0))):
        with pytest.raises(ConfigError, match="learns from held-out pairs, and there are none"):
            prepare_judges([FITTED], storage, fit_on=none)


@pytest.fixture(autouse=True)
def odd_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "modules" / "test_needs.py"
    file.parent.mkdir()
    file.write_text("class Odd:\n    name = 'odd'\n    needs = ('image', 'moonlight')\n    def score(self): ...\n")
    monkeypatch.syspath_prepend(file.parent)
    return file


def test_bfloat16_is_refused_before_work(storage: Storage, twins: Path, tmp_path: Path) -> None:
    shutil.copytree(twins, copy := tmp_path / "rounded")
    weights = load_file(copy / "pickscore-v1" / "model.safetensors")
    rounded = {name: each.to(torch.bfloat16) for name, each in weights.items()}
    save_file(rounded, copy / "pickscore-v1" / "model.safetensors")
    with pytest.raises(ModelError, match="is bfloat16"):
        prepare_judges([ScorerEntry(name="pickscore", weights=str(copy))], storage)


def test_a_fingerprint_covers_what_a_scorer_learns_and_its_code(
    storage: Storage, fit: FitPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint(pairs: FitPairs, entry: ScorerEntry = FITTED) -> str:
        (judge,) = prepare_judges([entry], storage, fit_on=pairs)
        return judge.fingerprint

    first = fingerprint(fit)
    assert len(first) == 32
    assert int(first, 16) >= 0
    assert fingerprint(fit) == first
    flipped = fit.table.set_column(1, "label_0", pc.subtract(1.0, fit.table["label_0"]))
    others = [fit.table.slice(1), flipped, _changed(fit.table, "prompt"), _changed(fit.table, "image_0_sha256")]
    assert len({first, *(fingerprint(FitPairs(each)) for each in others)}) == 5
    moved = fit.table.set_column(2, "shard", pa.array(["elsewhere"] * fit.table.num_rows))
    assert fingerprint(FitPairs(moved)) == first, "what is learnt, not where it lies"

    file = tmp_path / "mine.py"
    code = "class Mine:\n    name = 'mine'\n    version = '1'\n    def score(self, images, prompts): return []\n"
    file.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    mine = ScorerEntry(name="mine:Mine")
    before = fingerprint(fit, mine)
    file.write_text(code + "# another line\n")
    assert fingerprint(fit, mine) != before


def _changed(table: pa.Table, name: str) -> pa.Table:
    values = table[name].to_pylist()
    return table.set_column(table.column_names.index(name), name, pa.array([f"{values[0]}x", *values[1:]]))


def test_ties_are_left_out_of_what_scorers_learn(fit: FitPairs, storage: Storage) -> None:
    tied = fit.table.set_column(1, "label_0", pa.array([0.5, 1.0, 0.0]))
    learnt = FitPairs(tied).read(storage)
    assert len(learnt.chosen) == len(learnt.rejected) == len(learnt.prompts) == 2


def test_a_fingerprint_follows_the_weights_and_not_their_folder(
    storage: Storage, twins: Path, tmp_path: Path, empty_cache: Path
) -> None:
    def fingerprint(folder: Path | None, name: str = "pickscore") -> Any:
        weights = None if folder is None else str(folder)
        (judge,) = prepare_judges([ScorerEntry(name=name, weights=weights, batch_size=3)], storage)
        return judge.fingerprint

    shutil.copytree(twins, copy := tmp_path / "copy")
    first = fingerprint(twins)
    assert fingerprint(copy) == first
    weights = load_file(copy / "pickscore-v1" / "model.safetensors")
    weights["logit_scale"] += 0.1
    save_file(weights, copy / "pickscore-v1" / "model.safetensors")
    assert fingerprint(copy) != first
    assert fingerprint(twins, "hpsv2") != fingerprint(twins, "hpsv2-noantialias")
