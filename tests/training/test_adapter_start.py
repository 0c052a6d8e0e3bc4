"""A training that starts from a file of adapters starts from the very model that diffusers makes of this file."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_work import started_from_file
from checkpoints import trained_adapters, write_checkpoint
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from encoded import write_base
from engine_work import CONFIG
from factories import new_pipeline, new_sd15_pipeline
from parent_work import tiles
from peft.utils import get_peft_model_state_dict
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.dataset.adapter_files import find_adapter
from pipelines.dataset.errors import ConfigError, MapoError, ModelError
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.storage import Storage
from training.adapter_file import check_adapter, keep_adapter, pinned_digest
from training.adapter_start import read_matrices, start_unet
from training.config import LoraConfig, TrainConfig
from training.export import export_model
from training.model import add_lora
from training.spec import Snapshot, TrainSpec, adapter_file

NEW = {"sdxl": new_pipeline, "sd15": new_sd15_pipeline}
CLASSES = {"sdxl": StableDiffusionXLPipeline, "sd15": StableDiffusionPipeline}
NAME = "pytorch_lora_weights.safetensors"
SDXL = Path("../shared/sdxl")
PLAIN = LoraConfig(rank=4)


@pytest.fixture(params=["sdxl", "sd15"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def predicted(unet: Any) -> Tensor:
    """What a UNet of either family makes of the same noise and prompt."""
    generator, config = torch.Generator().manual_seed(0), unet.config
    inputs: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(2, 77, config.cross_attention_dim, generator=generator)
    }
    if config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {"text_embeds": torch.ones(2, 24), "time_ids": torch.full((2, 6), 64.0)}
    with torch.no_grad():
        sample = torch.randn(2, 4, 16, 16, generator=generator)
        return unet.float().eval()(sample, torch.tensor(300), **inputs).sample


def peft_state(family: str, lora: LoraConfig = PLAIN) -> dict[str, Tensor]:
    """Adapters that change what the UNet predicts, under peft's names."""
    pipeline = NEW[family]()
    pipeline.unet.load_state_dict(trained_adapters(pipeline, lora), strict=False)
    return get_peft_model_state_dict(pipeline.unet)


def kohya_state(family: str, alpha: float, lora: LoraConfig = PLAIN) -> dict[str, Tensor]:
    """The same under kohya's names, by diffusers' own writer."""
    found = convert_state_dict_to_kohya({f"unet.{name}": weight for name, weight in peft_state(family, lora).items()})
    found = {name.replace("unet", "lora_unet", 1) if name.startswith("unet") else name: w for name, w in found.items()}
    return {name: torch.tensor(alpha) if name.endswith(".alpha") else w.contiguous() for name, w in found.items()}


def written(folder: Path, state: dict[str, Tensor], **metadata: str) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in state.items()}, folder / NAME, metadata or None)
    return folder / NAME


def started(family: str, file: Path, lora: LoraConfig) -> Any:
    """The UNet that training starts with."""
    unet = NEW[family]().unet
    check_adapter({name: tuple(weight.shape) for name, weight in load_file(file).items()}, lora)
    add_lora(unet, lora, seed=3)
    start_unet(unet, read_matrices(file.read_bytes(), lora, unet.config), lora)
    return unet


def of_diffusers(family: str, file: Path) -> Any:
    pipeline = NEW[family]()
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    return pipeline.unet


def assert_same_model(family: str, file: Path, lora: LoraConfig) -> None:
    expected, plain = predicted(of_diffusers(family, file)), predicted(NEW[family]().unet)
    found = predicted(started(family, file, lora))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert (expected - plain).abs().mean() > 0.01


WIDE = LoraConfig(rank=4, alpha=2, targets=("to_q", "ff.net.2"))


@pytest.mark.parametrize("exported_with", [PLAIN, LoraConfig(rank=4, alpha=1.5), WIDE], ids=["plain", "scaled", "wide"])
def test_an_export_is_continued_at_any_alpha(exported_with: LoraConfig, family: str, tmp_path: Path) -> None:
    """Of the same alpha and of another, which is folded into the weights."""
    NEW[family]().save_pretrained(tmp_path / "base")
    storage = Storage(str(tmp_path / "storage"))
    checkpoint = write_checkpoint(storage, "runs/a/checkpoints/01", 8, trained_adapters(NEW[family](), exported_with))
    source = ModelSource(str(tmp_path / "base"))
    export_model(storage, checkpoint=checkpoint, source=source, target="model", card="", lora=exported_with)
    file = find_adapter(storage.path("model/lora"))
    for alpha in (exported_with.alpha, 3.0):
        assert_same_model(family, file, exported_with.model_copy(update={"alpha": alpha}))


def test_files_without_a_description_have_the_scale_1(family: str, tmp_path: Path) -> None:
    state = {f"unet.{name}": weight for name, weight in peft_state(family).items()}
    assert_same_model(family, written(tmp_path / "peft", state), LoraConfig(rank=4, alpha=8))


@pytest.mark.parametrize("alpha", [4.0, 1.0, 0.7])
def test_kohyas_names_and_alpha(alpha: float, family: str, tmp_path: Path) -> None:
    file = written(tmp_path / "kohya", kohya_state(family, alpha))
    assert all(name.startswith("lora_unet_") for name in load_file(file))
    assert_same_model(family, file, PLAIN)


def test_every_layer_has_kohyas_alpha_of_its_own(tmp_path: Path) -> None:
    """Beside the merged weights W + alpha / rank * up @ down of kohya's definition."""
    state = kohya_state("sdxl", 1.0)
    names = sorted(name for name in state if name.endswith(".alpha"))
    state |= {name: torch.tensor(0.2 + number / 20) for number, name in enumerate(names)}
    merged = NEW["sdxl"]().unet
    layers = {f"lora_unet_{name.replace('.', '_')}": layer for name, layer in merged.named_modules()}
    for name in names:
        layer, stem = layers[name.removesuffix(".alpha")], name.removesuffix(".alpha")
        change = state[f"{stem}.lora_up.weight"] @ state[f"{stem}.lora_down.weight"]
        layer.weight.data += state[name] / 4 * change
    expected = predicted(merged)
    found = predicted(started("sdxl", written(tmp_path / "kohya", state), PLAIN))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.skipif(not SDXL.is_dir(), reason="needs SDXL's configuration")
@pytest.mark.parametrize("numbering", ["diffusers", "sgm"])
def test_every_attention_layer_of_sdxl_is_found_under_kohyas_names(numbering: str, tmp_path: Path) -> None:
    """On the meta device; kohya's script for SDXL numbers blocks as Stability's code does, and others as diffusers."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SDXL / "unet"))
    targets = tuple(f".{name}" for name in PLAIN.targets)
    layers = [name for name, _ in unet.named_modules() if name.endswith(targets)]
    state, expected = {}, {}
    for number, name in enumerate(layers):
        stem = f"lora_unet_{(sgm_name(name) if numbering == 'sgm' else name).replace('.', '_')}"
        mark = torch.tensor([[float(number)]])
        state |= {
            f"{stem}.lora_down.weight": mark,
            f"{stem}.lora_up.weight": mark.clone(),
            f"{stem}.alpha": torch.tensor(1.0),
        }
        expected |= {f"{name}.lora_{side}.weight": number for side in "AB"}
    assert len(state) == 3 * 560, "70 transformer blocks of 2 attentions with 4 projections"
    found = read_matrices(written(tmp_path / "sdxl", state).read_bytes(), LoraConfig(rank=1), unet.config)
    assert {name: int(weight) for name, weight in found.items()} == expected


def sgm_name(name: str) -> str:
    """Stability's name of a layer of SDXL's attentions: blocks are counted through, 3 or 2 layers a level."""
    block, *rest = name.split(".")
    if block == "mid_block":
        return ".".join(["middle_block", "1", *rest[2:]])
    level, layer = int(rest[0]), int(rest[2])
    number = 3 * level + layer + (1 if block == "down_blocks" else 0)
    return ".".join(["input_blocks" if block == "down_blocks" else "output_blocks", str(number), "1", *rest[3:]])


LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
ADDED = {
    "DoRA": ({f"{LAYER}.dora_scale": (32, 1)}, "has DoRA: 1 tensors"),
    "LoHa": ({"lora_unet_x.hada_w1_a": (4, 4)}, "has LoHa"),
    "LoKr": ({"lora_unet_x.lokr_w1": (4, 4)}, "has LoKr"),
    "OFT": ({"lora_unet_x.oft_blocks": (4, 4)}, "has OFT"),
    "full": ({"lora_unet_x.diff": (4, 4)}, "has full weight differences"),
    "conv": ({"lora_unet_x.lora_down.weight": (4, 8, 3, 3)}, r"convolutions \(LoCon\): 1 tensors, such as lora_unet_x"),
    "text": ({"lora_te1_x.lora_down.weight": (4, 8)}, "adapters of text encoders"),
    "text of diffusers": ({"text_encoder.x.lora_A.weight": (4, 8)}, "adapters of text encoders"),
    "other": ({"position_ids": (1, 77)}, "not a file of LoRA adapters: 1 tensors, such as position_ids"),
    "no partner": ({"lora_unet_x.lora_down.weight": (4, 8)}, "adapters: 1 tensors, such as lora_unet_x"),
    "transformer": ({"transformer.x.lora_A.weight": (4, 8)}, "not a file of LoRA adapters"),
    "rank": ({f"{LAYER}.lora_down.weight": (8, 32)}, "rank 4: it has rank 4 in 1 layers, rank 8 in 1 layers, " + LAYER),
}  # fmt: skip


@pytest.mark.parametrize("case", ADDED)
def test_what_cannot_be_continued_is_refused_by_its_name(case: str) -> None:
    added, message = ADDED[case]
    second = LAYER.replace("to_q", "to_k")
    shapes = {f"{layer}.lora_{side}.weight": size for layer in (LAYER, second) for side, size in SIDES.items()}
    lora = LoraConfig(rank=4, weights="mine.safetensors")
    check_adapter(shapes, lora)
    with pytest.raises(MapoError, match=message) as caught:
        check_adapter(shapes | added, lora)
    assert "train.lora.weights mine.safetensors" in str(caught.value)


SIDES = {"down": (4, 32), "up": (32, 4)}


def test_adapters_of_other_layers_are_refused_with_the_targets_to_set(tmp_path: Path) -> None:
    file = written(tmp_path / "wide", {f"unet.{name}": weight for name, weight in peft_state("sdxl", WIDE).items()})
    with pytest.raises(
        ConfigError, match=r"layers only in the file, .*ff\.net\.2 first; .*only in `train\.lora"
    ) as caught:
        started("sdxl", file, PLAIN)
    assert "[net.2, to_q]" in str(caught.value.hint)
    assert_same_model("sdxl", file, LoraConfig(rank=4, targets=("net.2", "to_q")))


def test_adapters_of_another_base_are_refused(tmp_path: Path) -> None:
    state = {f"unet.{name}": weight for name, weight in peft_state("sdxl").items()}
    state = {name: w[:, :-1] if name.endswith("lora_A.weight") else w for name, w in state.items()}
    with pytest.raises(ConfigError, match=r"has the shape \(4, \d+\), not \(4, \d+\)"):
        started("sdxl", written(tmp_path / "narrow", state), PLAIN)


def spec_of(storage: Storage, base: Path, digest: str | None, **changes: Any) -> TrainSpec:
    config = TrainConfig.model_validate(CONFIG.model_dump() | changes)
    source = ModelSource(str(base))
    return TrainSpec(storage.url, "test", source, "e" * 16, 0, config, Snapshot(0, "", 0, "", 0), adapter_digest=digest)


def test_the_key_has_the_bytes_of_the_file_and_not_its_place(tmp_path: Path) -> None:
    storage, keys = Storage(str(tmp_path / "storage")), []
    state = {f"unet.{name}": weight for name, weight in peft_state("sdxl").items()}
    other = {name: 2 * weight for name, weight in state.items()}
    for folder, weights in (("a", state), ("b", state), ("c", other)):
        lora = LoraConfig(rank=4, weights=str(written(tmp_path / folder, weights)))
        digest = pinned_digest(storage, "runs/test", lora)
        keys.append(spec_of(storage, tmp_path, digest, lora=lora.model_dump()).key)
    without = spec_of(storage, tmp_path, None, lora={"rank": 4})
    assert len({*keys, without.key}) == 3
    assert keys[0] == keys[1]
    assert "weights" not in without.config.model_dump()["lora"], "older records of a round's adapters are still equal"


def test_a_begun_training_does_not_need_the_file_again(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "storage"))
    file = written(tmp_path / "mine", {f"unet.{name}": weight for name, weight in peft_state("sdxl").items()})
    lora = LoraConfig(rank=4, weights=str(file))
    digest = pinned_digest(storage, "runs/test", lora)
    assert storage.names() == [], "a plan writes nothing"
    keep_adapter(spec_of(storage, tmp_path, digest, lora=lora.model_dump()))
    assert storage.read(adapter_file("runs/test", str(digest))) == file.read_bytes()
    file.unlink()
    assert pinned_digest(storage, "runs/test", lora) == digest
    with pytest.raises(ModelError, match="there are no adapters"):
        pinned_digest(storage, "runs/other", lora)


def test_a_place_is_a_file_a_folder_or_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = written(tmp_path / "mine", {"unet.x.lora_A.weight": torch.zeros(1, 1)})
    places = (str(file), str(file.parent), f"file://{file}", f"file://{file.parent}/")
    assert {find_adapter(place) for place in places} == {file}
    with pytest.raises(
        ModelError, match=r"fetching pytorch_lora_weights\.safetensors of nobody/nothing from the hub failed"
    ):
        find_adapter("nobody/nothing")
    with pytest.raises(ModelError, match=r"fetching x\.safetensors of nobody/nothing from the hub failed"):
        find_adapter("nobody/nothing/x.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="is damaged"):
        find_adapter(str(file))


def test_a_remote_file_is_fetched_once_for_each_of_its_states(
    s3_storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "cache"))
    for number in (1, 2):
        mine = written(tmp_path / "mine", {"unet.x.lora_A.weight": torch.full((1, number), 1.0)})
        s3_storage.upload("mine/a.safetensors", mine)
        found = {find_adapter(s3_storage.uri("mine")), find_adapter(s3_storage.uri("mine/a.safetensors"))}
        assert [file.read_bytes() for file in found] == [mine.read_bytes()]
    assert len(list((tmp_path / "cache" / "loras").glob("*.safetensors"))) == 2
    with pytest.raises(ModelError, match="there are no adapters"):
        find_adapter(s3_storage.uri("mine/b.safetensors"))


CASES = {
    "sft bf16": {"method": "sft", "precision": "bf16", "ema": {"decay": 0.9}},
    "dpo 2": {"method": "dpo", "zero_stage": 2},
    "dpo 3": {"method": "dpo", "zero_stage": 3},
}


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What two ranks found, by case, and the weights of the file."""
    folder = tmp_path_factory.mktemp("ranks")
    base = write_base(folder / "base")
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    add_lora(unet, PLAIN, seed=0)
    generator = torch.Generator().manual_seed(1)
    weights = {
        n: 0.1 * torch.randn(w.shape, generator=generator) for n, w in unet.named_parameters() if w.requires_grad
    }
    file = written(
        folder / "mine", {f"unet.{name.replace('.default', '')}": weight for name, weight in weights.items()}
    )
    lora = PLAIN.model_copy(update={"weights": str(file)})
    storage = Storage(str(folder / "storage"))
    digest = pinned_digest(storage, "runs/test", lora)
    specs = [spec_of(storage, base, digest, lora=lora.model_dump(), **case) for case in CASES.values()]
    keep_adapter(specs[0])
    shutil.rmtree(folder / "mine")
    ranks = on_ranks(2, started_from_file, specs, 2)
    return {name: [rank[number] for rank in ranks] for number, name in enumerate(CASES)}, weights


@pytest.mark.parametrize("case", CASES)
def test_optimizer_and_average_start_from_the_files_float32_bits(case: str, on_two_ranks: Any) -> None:
    found, expected = on_two_ranks[0][case], on_two_ranks[1]
    kinds = ("parts", "ema") if case == "sft bf16" else ("parts",)
    for kind in kinds:
        whole = tiles([part for rank in found for part in rank[kind]])
        assert whole.keys() == expected.keys(), "the reference's adapters are not trained"
        assert all(torch.equal(whole[name], expected[name].flatten()) for name in whole)


@pytest.mark.parametrize("case", ["dpo 2", "dpo 3"])
def test_the_reference_of_dpo_is_the_model_that_training_starts_from(case: str, on_two_ranks: Any) -> None:
    for rank in on_two_ranks[0][case]:
        before, after = rank["before"], rank["after"]
        assert torch.equal(before["chosen"], before["ref_chosen"])
        assert rank["curve"][0] == pytest.approx(math.log(2), abs=1e-6)
        assert torch.equal(after["ref_chosen"], before["ref_chosen"])
        assert not torch.equal(after["chosen"], after["ref_chosen"])
        assert abs(rank["curve"][1] - math.log(2)) > 1e-3
