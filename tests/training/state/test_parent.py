"""A round that goes on from another starts from the very weights of its parent, and is a training like any other."""

import hashlib
import json
import os
import shutil
import signal
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from encoded import write_base, write_encoded
from engine_work import CONFIG
from parent_work import started, tiles
from ranks import on_ranks

from pipelines.dataset.errors import ConfigError, ModelError, ShardCorrupt
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.storage import Storage
from training.config import TrainConfig
from training.export import read_weights
from training.launch import TrainingResult, train
from training.model import add_lora, load_base
from training.spec import Parent, TrainSpec, base_digest
from training.state.checkpoint_format import list_checkpoints
from training.state.parent import check_parent_is_there, load_parent, open_parent

FOLDER = "runs/test/checkpoints/0123456789abcdef"


def with_(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(CONFIG.model_dump() | changes)


def weights_like(unet: Any, seed: int) -> dict[str, torch.Tensor]:
    """What training may have made of the weights that learn: no two of 16 bits would do for them."""
    generator = torch.Generator().manual_seed(seed)
    named = {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}
    return {
        name: weight.detach() + 0.01 * torch.randn(weight.shape, generator=generator) for name, weight in named.items()
    }


def parent_of(storage: Storage, folder: str, spec: TrainSpec, **changes: Any) -> Parent:
    digest = hashlib.sha256(storage.read(f"{folder}/manifest.json")).hexdigest()
    known = {"round": 1, "key": "0123456789abcdef", "weights": "raw", "base_digest": spec.base_digest, "lora": None}
    return Parent(checkpoint=folder, manifest=digest, **known | changes)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    """A second round on a storage with a data set, and its parent's checkpoint, which no training made."""
    folder = tmp_path_factory.mktemp("parent")
    storage = Storage(str(folder / "storage"))
    source = ModelSource(str(write_base(folder / "base")))
    snapshot = write_encoded(storage, folder)
    first = TrainSpec(storage.url, "test", source, base_digest(source), 0, CONFIG, snapshot)
    unet = load_base(source).unet
    checkpoint = write_checkpoint(storage, FOLDER, 4, weights_like(unet, 1), average=weights_like(unet, 2))
    return replace(first, round=2, parent=parent_of(storage, checkpoint, first))


@pytest.fixture
def copied(spec: TrainSpec, tmp_path: Path) -> TrainSpec:
    """The same on a storage that may be damaged."""
    return replace(spec, storage_url=str(shutil.copytree(spec.storage.path(), tmp_path / "storage")))


def assert_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].flatten()) for name in found)


CONFIGS = {
    "stage 1": with_(zero_stage=1),
    "stage 2": with_(zero_stage=2, ema={"decay": 0.9}),
    "stage 3": with_(zero_stage=3, ema={"decay": 0.9}),
    "offload": with_(zero_stage=2, offload="cpu"),
    "bf16 3": with_(zero_stage=3, precision="bf16"),
}
LORA = with_(lora={"rank": 4})


@pytest.fixture(scope="module")
def starts(spec: TrainSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What two ranks found, by case: all in the same processes, since these take longer to start than to work."""
    folder = tmp_path_factory.mktemp("starts")
    cases = {name: replace(spec, config=config) for name, config in CONFIGS.items()}
    base = shutil.copytree(spec.base.model, folder / "base")  # the parent's weights as a base model
    unet = load_base(spec.base).unet
    unet.load_state_dict(weights_in(spec, "raw"), strict=False)
    unet.save_pretrained(base / "unet")
    plain = replace(spec, base=ModelSource(str(base)), parent=None)
    cases |= {f"plain {name}": replace(plain, config=CONFIGS[name]) for name in ("stage 2", "stage 3")}
    cases["average"] = replace(spec, parent=replace(spec.parent, weights="ema"))
    storage = Storage(str(folder / "adapters"))
    adapters = parent_of(storage, write_checkpoint(storage, FOLDER, 4, adapters_of(spec)), spec)
    cases["adapters"] = replace(spec, config=LORA, storage_url=storage.url, parent=adapters)
    cases["another unet"] = replace(spec, config=LORA)
    flipped = Storage(str(shutil.copytree(spec.storage.path(), folder / "flipped")))
    flip(Path(flipped.path(spec.parent.checkpoint)) / "rank-00001.safetensors")
    cases["flipped"] = replace(spec, storage_url=flipped.url)
    ranks = on_ranks(2, started, list(cases.values()), 2)
    return {name: [rank[number] for rank in ranks] for number, name in enumerate(cases)}


def weights_in(spec: TrainSpec, kind: str) -> dict[str, torch.Tensor]:
    found = read_weights(spec.storage, spec.parent.checkpoint, kind)
    return {name: torch.from_numpy(weight) for name, weight in found.items()}


def adapters_of(spec: TrainSpec) -> dict[str, torch.Tensor]:
    unet = load_base(spec.base).unet
    add_lora(unet, LORA.lora, seed=0)
    return weights_like(unet, 3)


def flip(file: Path) -> None:
    """Change the last bit of a file."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def of_all_ranks(found: list[dict[str, Any]], kind: str) -> dict[str, torch.Tensor]:
    return tiles([part for rank in found for part in rank["parts"][kind]])


@pytest.mark.parametrize("case", CONFIGS)
def test_every_stage_starts_from_the_parents_bits_with_a_fresh_optimizer(
    case: str, spec: TrainSpec, starts: dict[str, Any]
) -> None:
    """Of bf16 too: the float32 weights are the parent's own, not those that the cast model would give."""
    found, expected = starts[case], weights_in(spec, "raw")
    assert_bits(of_all_ranks(found, "weight"), expected)
    for kind in ("exp_avg", "exp_avg_sq"):
        assert all(not view.any() for rank in found for _, view in rank["parts"][kind])
    if CONFIGS[case].ema:
        assert_bits(tiles([part for rank in found for part in rank["ema"]]), expected)
    for name, weight in found[0]["computing"].items():
        assert torch.equal(weight, expected[name].to(weight.dtype)), "what computes is what was loaded"
    assert found[0]["steps"] == 2


@pytest.mark.parametrize("case", ["stage 2", "stage 3"])
def test_from_there_it_trains_like_a_base_of_these_weights(case: str, starts: dict[str, Any]) -> None:
    """To rounding: other places in memory let kernels add up in another order."""
    assert starts[case][0]["curve"] == pytest.approx(starts[f"plain {case}"][0]["curve"], abs=1e-6)


def test_the_average_is_where_the_round_starts_if_that_was_exported(spec: TrainSpec, starts: dict[str, Any]) -> None:
    assert_bits(of_all_ranks(starts["average"], "weight"), weights_in(spec, "ema"))


def test_adapters_go_on_from_adapters(spec: TrainSpec, starts: dict[str, Any]) -> None:
    assert_bits(of_all_ranks(starts["adapters"], "weight"), adapters_of(spec))


def test_a_flipped_bit_or_another_unet_ends_every_rank_with_the_same_words(starts: dict[str, Any]) -> None:
    for case, words in (("flipped", "ShardCorrupt: round 1 ("), ("another unet", "ConfigError: round 1 (")):
        first, second = starts[case]
        assert first == second
        assert first["error"].startswith(words)
    assert "has another UNet" in starts["another unet"][0]["error"]


def test_a_reference_is_the_model_that_the_round_starts_from(spec: TrainSpec) -> None:
    unet = load_base(spec.base).unet
    load_parent(spec, unet)
    expected = read_weights(spec.storage, spec.parent.checkpoint, "raw")
    assert all(torch.equal(weight, torch.from_numpy(expected[name])) for name, weight in unet.named_parameters())


def test_a_reference_of_adapters_that_would_be_the_base_is_refused() -> None:
    with pytest.raises(ValueError, match="adapters switched off give the base"):
        with_(rounds="continue", method="dpo", loss={"beta": 100.0}, lora={"rank": 4})
    assert with_(rounds="continue", method="dpo", loss={"beta": 100.0}).rounds == "continue"


def test_the_parent_is_part_of_the_key_and_how_many_rounds_are_kept_is_not(spec: TrainSpec) -> None:
    first = replace(spec, parent=None)
    assert first.key != spec.key
    assert replace(first, round=7).key == first.key
    for change in ({"weights": "ema"}, {"manifest": "0" * 64}, {"key": "f" * 16}):
        assert replace(spec, parent=replace(spec.parent, **change)).key != spec.key
    for change in ({"rounds": "continue"}, {"keep_rounds": 5}):
        assert replace(first, config=with_(**change)).key == first.key


@pytest.mark.parametrize("damage", ["gone", "other", "cut", "index", "average"])
def test_a_parent_that_is_not_whole_is_an_error_before_any_worker_starts(damage: str, copied: TrainSpec) -> None:
    folder = Path(copied.storage.path(copied.parent.checkpoint))
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "other":
        write_checkpoint(copied.storage, FOLDER, 5, weights_like(load_base(copied.base).unet, 9))
        other = list_checkpoints(copied.storage, FOLDER)[-1].folder
        shutil.copy(copied.storage.path(f"{other}/manifest.json"), folder / "manifest.json")
    elif damage == "cut":
        tensors = folder / "rank-00001.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-4])
    elif damage == "index":
        (folder / "rank-00000.json").write_text("{}")
    else:
        bare = write_checkpoint(copied.storage, FOLDER, 6, weights_like(load_base(copied.base).unet, 9))
        copied = replace(copied, parent=parent_of(copied.storage, bare, copied, weights="ema"))
    expected = ShardCorrupt if damage in ("cut", "index") else ModelError
    with pytest.raises(expected, match=r"round 1 \(runs/test/checkpoints/0123456789abcdef/step-0000000") as caught:
        check_parent_is_there(copied)
    assert "train.rounds: restart" in str(caught.value.hint)


def test_a_round_that_has_a_checkpoint_of_its_own_needs_no_parent_any_more(copied: TrainSpec) -> None:
    shutil.rmtree(copied.storage.path(copied.parent.checkpoint))
    write_checkpoint(copied.storage, copied.checkpoints, 2, weights_like(load_base(copied.base).unet, 9))
    check_parent_is_there(copied)
    with pytest.raises(ModelError, match="is missing"):
        open_parent(copied.storage, copied.parent)
    dpo = replace(copied, config=with_(method="dpo", loss={"beta": 100.0}, max_steps=9))
    write_checkpoint(copied.storage, dpo.checkpoints, 2, weights_like(load_base(copied.base).unet, 9))
    with pytest.raises(ModelError, match="is missing"):
        check_parent_is_there(dpo)


def test_a_damaged_parent_of_a_reference_and_one_of_another_unet_are_named(copied: TrainSpec) -> None:
    adapted = load_base(copied.base).unet
    add_lora(adapted, LORA.lora, seed=0)
    with pytest.raises(ConfigError, match="has another UNet"):
        load_parent(copied, adapted)
    flip(Path(copied.storage.path(copied.parent.checkpoint)) / "rank-00001.safetensors")
    with pytest.raises(ShardCorrupt, match="round 1"):
        load_parent(copied, load_base(copied.base).unet)


# real training, Ray and all

STEPS = 12
ROUND = TrainConfig(
    num_workers="2..2", global_batch_size=10, micro_batch_size=2, max_steps=STEPS, learning_rate=2e-3, precision="fp32",
    gradient_checkpointing=False, checkpoint_every=2, validate_every=STEPS, ema={"decay": 0.9}, keep_checkpoints=20,
    rounds="continue",
)  # fmt: skip


def round_of(spec: TrainSpec, run: str, **changes: Any) -> TrainSpec:
    return replace(spec, run=run, config=TrainConfig.model_validate(ROUND.model_dump() | changes))


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, spec: TrainSpec) -> tuple[TrainSpec, TrainingResult]:
    second = round_of(spec, "second")
    return second, train(second, lambda progress: None)


def assert_same_weights(one: tuple[TrainSpec, TrainingResult], other: tuple[TrainSpec, TrainingResult]) -> None:
    for kind in ("raw", "ema"):
        expected, found = (read_weights(spec.storage, trained.checkpoint, kind) for spec, trained in (one, other))
        assert all(expected[name].tobytes() == found[name].tobytes() for name in expected)


@pytest.mark.slow
def test_killed_in_its_second_half_a_round_ends_with_the_bits_of_an_undisturbed_one(
    undisturbed: tuple[TrainSpec, TrainingResult],
) -> None:
    spec = round_of(undisturbed[0], "killed", max_failures=1)
    assert spec.key == undisturbed[0].key
    killed: list[int] = []

    def kill() -> None:
        """One rank, once there is a checkpoint; before that it would only start again from the parent."""
        while not ended.wait(0.005):
            if list_checkpoints(spec.storage, spec.checkpoints):
                workers = json.loads(spec.storage.read(f"{spec.folder}/progress.json"))["workers"]
                os.kill(int(workers[1]["pid"]), signal.SIGKILL)
                killed.append(1)
                return

    ended = threading.Event()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        trained = train(spec, lambda progress: None)
    finally:
        ended.set()
        killer.join()
    assert killed
    assert trained.starts == 2
    assert [step["step"] for step in trained.history["steps"]] == list(range(1, STEPS + 1))
    assert trained.digest == undisturbed[1].digest
    assert_same_weights(undisturbed, (spec, trained))


@pytest.mark.slow
def test_one_worker_goes_on_where_two_were_with_the_same_curve(undisturbed: tuple[TrainSpec, TrainingResult]) -> None:
    spec = round_of(undisturbed[0], "fewer", num_workers="1..1")
    storage = spec.storage
    shutil.copytree(storage.path(undisturbed[0].folder), storage.path(spec.folder))
    for manifest in list_checkpoints(storage, spec.checkpoints):
        if manifest.step > 4:
            storage.delete(f"{manifest.folder}/manifest.json")
    trained = train(spec, lambda progress: None)
    losses = [[step["loss"] for step in each.history["steps"]] for each in (undisturbed[1], trained)]
    assert trained.digest == undisturbed[1].digest
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[1][:4] == losses[0][:4]
    assert asdict(spec.parent) == asdict(undisturbed[0].parent)
