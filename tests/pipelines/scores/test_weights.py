"""Weights: brought from a file, a folder or the hub, checked, converted; in full or not at all; never with code."""

import dataclasses
import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scorer_twins import (
    CLIP_TOKENIZER,
    formula_image,
    formula_weights,
    write_bert_tokenizer,
)

from pipelines.dataset.errors import ConfigError, ModelError
from pipelines.scores import downloads, weights
from pipelines.scores.parts import PARTS
from pipelines.scores.scorers import new_scorer, scorer_names
from pipelines.scores.weights import fetch, files_digest, files_of, find, part_folder

AFFINE = Path("/work/shared/benchmarks/aesthetic/sac-logos-ava1-l14-affine.safetensors")


@pytest.fixture
def hps_file(tmp_path: Path, recorded: dict[str, Any]) -> Path:
    """A checkpoint as HPSv2 publishes it, and CLIP's tokenizer, in one folder."""
    folder = tmp_path / "given"
    folder.mkdir()
    file = folder / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": formula_weights(recorded["hps"]["shapes"])}, file)
    if not CLIP_TOKENIZER.is_dir():
        pytest.skip("CLIP's tokenizer is not on this machine")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(CLIP_TOKENIZER / name, folder / name)
    return file


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def listing(folder: Path) -> list[str]:
    """Everything in a folder, locks aside."""
    return sorted(
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.suffix != ".lock" and file.is_file()
    )


def test_every_part_of_every_scorer_is_in_the_table() -> None:
    used = {part for name in scorer_names() for part in new_scorer(name).parts}
    assert used == set(PARTS)
    for part in PARTS.values():
        assert part.licence in ("MIT", "Apache-2.0", "BSD-3-Clause")
        assert part.repo or all(file.url for file in part.files)


def test_a_missing_scorer_says_which_command_brings_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        find("hpsv2.1", tmp_path)
    assert caught.value.hint == "mapo scorers fetch hpsv2.1"
    assert "hps-v2.1, clip-tokenizer" in caught.value.message
    with pytest.raises(ConfigError):
        find("no-such-scorer", tmp_path)
    assert find("saturation", tmp_path) == tmp_path / "scorers"


def test_a_pickle_in_open_clips_names_becomes_the_same_model(
    hps_file: Path, tmp_path: Path, recorded: dict[str, Any]
) -> None:
    root = fetch("hpsv2.1", hps_file.parent, tmp_path / "cache")
    assert root == tmp_path / "cache" / "scorers" == find("hpsv2.1", tmp_path / "cache")
    assert listing(root) == [
        "clip-tokenizer/fetched.json", "clip-tokenizer/merges.txt", "clip-tokenizer/vocab.json",
        "hps-v2.1/config.json", "hps-v2.1/fetched.json", "hps-v2.1/model.safetensors",
    ]  # fmt: skip
    record = json.loads((root / "hps-v2.1" / "fetched.json").read_text())
    assert record["sources"] == [{"name": hps_file.name, "from": str(hps_file), "sha256": sha256(hps_file)}]
    assert record["files"]["model.safetensors"]["sha256"] == sha256(root / "hps-v2.1" / "model.safetensors")
    official, ours = formula_weights(recorded["hps"]["shapes"]), load_file(root / "hps-v2.1" / "model.safetensors")
    assert sum(each.numel() for each in ours.values()) == sum(each.numel() for each in official.values())
    scorer = new_scorer("hpsv2.1")
    scorer.load(root, "cpu")
    (found,) = scorer.score([formula_image(224, 224, 0)], ["A Red Cat"])
    assert found.value == pytest.approx(100 * recorded["hps"]["scores"][0], abs=1e-4)


def test_the_same_file_converts_to_the_same_bytes(hps_file: Path, tmp_path: Path) -> None:
    roots = [fetch("hpsv2.1", hps_file.parent, tmp_path / name) for name in ("first", "second")]
    assert len({sha256(root / "hps-v2.1" / "model.safetensors") for root in roots}) == 1


def test_weights_without_a_path_come_from_the_nodes_cache(
    hps_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "node"))
    with pytest.raises(ModelError, match="not on this machine"):
        new_scorer("hpsv2.1").load(None, "cpu")
    fetch("hpsv2.1", hps_file.parent)
    new_scorer("hpsv2.1").load(None, "cpu")


class Evil:
    """A pickle that would run a command."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self._trace,)


@pytest.mark.parametrize("wrap", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(hps_file: Path, tmp_path: Path, wrap: bool) -> None:
    trace = tmp_path / "was-run"
    if wrap:
        torch.save({"state_dict": {"x": Evil(trace)}}, hps_file)
    else:
        hps_file.write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(ModelError, match="is refused") as caught:
        fetch("hpsv2.1", hps_file.parent, tmp_path / "cache")
    assert "never runs code" in str(caught.value.hint)
    assert not trace.exists()
    assert not (tmp_path / "cache" / "scorers" / "hps-v2.1").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"other": torch.zeros(2)}}, "does not hold the weights"),
        ([1, 2], "no tensors by name"),
        (torch.zeros(2), "no tensors by name"),
        ({"state_dict": {"visual.proj": torch.zeros(2, 2, dtype=torch.bfloat16)}}, "bfloat16"),
    ],
)
def test_another_file_is_refused(hps_file: Path, tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, hps_file)
    with pytest.raises(ModelError, match=message):
        fetch("hpsv2.1", hps_file.parent, tmp_path / "cache")


def test_a_wrong_digest_is_refused(hps_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = PARTS["hps-v2.1"]
    for digest, is_right in (("0" * 64, False), (sha256(hps_file), True)):
        pinned = dataclasses.replace(part, files=(dataclasses.replace(part.files[0], sha256=(digest,)),))
        monkeypatch.setitem(PARTS, "hps-v2.1", pinned)
        if is_right:
            fetch("hpsv2.1", hps_file.parent, tmp_path / "cache")
        else:
            with pytest.raises(ModelError, match="expected 0000"):
                fetch("hpsv2.1", hps_file.parent, tmp_path / "cache")
            with pytest.raises(ModelError):
                find("hpsv2.1", tmp_path / "cache")


def test_a_conversion_that_breaks_half_way_is_never_seen(
    hps_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fetch("hpsv2.1", hps_file.parent, tmp_path / "cache")
    before = {file: (root / file).read_bytes() for file in listing(root)}

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for place in ("_put", "file_sha256"):
        with monkeypatch.context() as patch:
            patch.setattr(weights, place, killed)
            with pytest.raises(KeyboardInterrupt):
                fetch("hpsv2.1", hps_file.parent, tmp_path / "cache")
            with pytest.raises(KeyboardInterrupt):
                fetch("hpsv2.1", hps_file.parent, tmp_path / "empty")
        assert {file: (root / file).read_bytes() for file in listing(root)} == before
        assert not listing(tmp_path / "empty")


def test_a_file_that_replaces_another_is_taken(hps_file: Path, tmp_path: Path) -> None:
    root = fetch("hpsv2.1", hps_file.parent, tmp_path / "cache")
    before = files_digest(root / "hps-v2.1", files_of("hps-v2.1"))
    state = torch.load(hps_file, weights_only=True)["state_dict"]
    torch.save({"state_dict": state | {"logit_scale": torch.tensor(3.0)}}, hps_file)
    fetch("hpsv2.1", hps_file, tmp_path / "cache")
    assert files_digest(root / "hps-v2.1", files_of("hps-v2.1")) != before
    assert not [each for each in listing(root) if ".fetch" in each]


def test_a_part_of_an_older_conversion_is_fetched_again(
    hps_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch("hpsv2.1", hps_file.parent, tmp_path / "cache")
    monkeypatch.setattr(weights, "VERSION", weights.VERSION + 1)
    with pytest.raises(ModelError, match="not on this machine"):
        find("hpsv2.1", tmp_path / "cache")
    fetch("hpsv2.1", hps_file.parent, tmp_path / "cache")


def test_two_preprocessings_share_one_model(twins: Path) -> None:
    scorers = [new_scorer(name) for name in ("hpsv2", "hpsv2-noantialias")]
    for scorer in scorers:
        scorer.load(twins, "cpu")
    assert scorers[0]._images is not scorers[1]._images
    assert scorers[0]._images.model is scorers[1]._images.model


def test_a_folder_without_the_files_names_them(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    with pytest.raises(ModelError, match=r"has none of the files HPS_v2.1_compressed.pt, vocab.json, merges.txt"):
        fetch("hpsv2.1", tmp_path / "given", tmp_path / "cache")
    with pytest.raises(ModelError, match="there is no"):
        fetch("hpsv2.1", tmp_path / "nowhere", tmp_path / "cache")


def test_without_a_network_the_hint_names_the_folder(
    hps_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable\nmore")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(ModelError) as caught:
        fetch("hpsv2.1", hps_file, tmp_path / "cache")  # the file is given, the tokenizer is not
    assert "vocab.json of clip-tokenizer from openai/clip-vit-large-patch14 at revision main" in caught.value.message
    assert "Network is unreachable" in caught.value.message
    assert "mapo scorers fetch hpsv2.1 --from FOLDER" in str(caught.value.hint)


def test_the_hub_is_asked_for_each_name_and_the_commit_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: dict[str, Any]
) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def download(repo: str, name: str, *, revision: str, local_dir: Path) -> str:
        asked.append(name)
        target = Path(local_dir) / name
        if name == "model.safetensors":
            raise EntryNotFoundError("no such file")
        torch.save(formula_weights(recorded["csd"]["shapes"]), target)
        notes = Path(local_dir) / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        notes.parent.mkdir(parents=True)
        notes.write_text("3a9df32\netag\n")
        return str(target)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    root = fetch("csd", None, tmp_path)
    assert asked == ["model.safetensors", "pytorch_model.bin"]
    record = json.loads((root / "csd-vit-l" / "fetched.json").read_text())
    assert record["sources"][0]["from"] == "tomg-group-umd/CSD-ViT-L@3a9df32"
    asked.clear()
    fetch("csd", None, tmp_path)
    assert not asked


def test_a_single_file_of_any_name_is_the_one_model(tmp_path: Path, recorded: dict[str, Any]) -> None:
    file = tmp_path / "my-csd.pth"
    state = {f"module.{name}": each for name, each in formula_weights(recorded["csd"]["shapes"]).items()}
    torch.save({"model_state_dict": state, "epoch": 3}, file)
    new_scorer("csd").load(fetch("csd", file, tmp_path / "cache"), "cpu")


def test_imagereward_converts_from_its_own_names(tmp_path: Path, recorded: dict[str, Any]) -> None:
    given = tmp_path / "given"
    write_bert_tokenizer(given).joinpath("vocab.txt").rename(given / "vocab.txt")
    state = formula_weights(recorded["imagereward"]["shapes"])
    beside = {"blip.vision_proj.weight": torch.zeros(2, 2), "blip.text_encoder.embeddings.position_ids": torch.zeros(1)}
    torch.save(state | beside, given / "ImageReward.pt")
    scorer = new_scorer("imagereward")
    scorer.load(fetch("imagereward", given, tmp_path / "cache"), "cpu")
    (found,) = scorer.score([formula_image(224, 224, 0)], ["a red cat"])
    assert found.value == pytest.approx(recorded["imagereward"]["scores"][0], abs=1e-5)


@pytest.mark.skipif(not AFFINE.is_file(), reason="the published head is not on this machine")
def test_the_published_head_is_the_pinned_one(tmp_path: Path, twins: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    shutil.copyfile(AFFINE, given / AFFINE.name)
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(twins / "clip-l14-openai" / name, given / name)
    root = fetch("aesthetic", given, tmp_path / "cache")
    assert load_file(root / "aesthetic-sac-logos-ava1" / "model.safetensors")["weight"].norm() == pytest.approx(
        18, abs=0.1
    )
    assert sha256(root / "clip-l14-openai" / "model.safetensors") == sha256(given / "model.safetensors")
    with pytest.raises(ModelError, match=r"not a weight of \(1, 32\)"):
        new_scorer("aesthetic").load(root, "cpu")  # the twin's CLIP is too narrow for it


def test_a_damaged_file_is_one_message(twins: Path, tmp_path: Path) -> None:
    shutil.copytree(twins / "dino-vits16", tmp_path / "dino-vits16")
    file = tmp_path / "dino-vits16" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="is damaged"):
        new_scorer("dino").load(tmp_path, "cpu")
    state = load_file(twins / "dino-vits16" / "model.safetensors")
    state.pop("layernorm.weight")
    save_file(state, file)
    with pytest.raises(ModelError, match=r"lacks 1 tensors, such as layernorm\.weight"):
        new_scorer("dino").load(tmp_path, "cpu")


def test_a_scorer_of_one_model_takes_that_models_folder_itself(twins: Path, tmp_path: Path) -> None:
    folder = tmp_path / "PickScore_v1"
    shutil.copytree(twins / "pickscore-v1", folder)
    with pytest.raises(ModelError, match=r"has no folder clip-tokenizer with vocab\.json and merges\.txt"):
        new_scorer("pickscore").load(folder, "cpu")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(twins / "clip-tokenizer" / name, folder / name)
    new_scorer("pickscore").load(folder, "cpu")
    assert new_scorer("pickscore").fingerprint(folder) == new_scorer("pickscore").fingerprint(twins)
    with pytest.raises(ModelError, match="has no folder aesthetic-sac-logos-ava1"):
        part_folder(folder, "aesthetic-sac-logos-ava1", is_only=False)


def test_a_download_from_a_url_is_whole_or_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import http.server
    import threading

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/there" else 404)
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(b"abc")

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert downloads._from_url(f"{url}/there", tmp_path / "file")[0].read_bytes() == b"abc"
        with pytest.raises(OSError, match="HTTP 404"):
            downloads._from_url(f"{url}/gone", tmp_path / "file")
        server.shutdown()
