"""An export is the checkpoint's weights in the base's pipeline, and diffusers loads it without being told anything."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import trained_adapters, trained_weights, write_checkpoint
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from factories import new_pipeline, new_sd15_pipeline
from sampled import draw_here
from torch import Tensor

from pipelines.dataset.errors import MapoError, ModelError, ShardCorrupt, TrainingError
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.storage import Storage
from training.config import ExportConfig, LoraConfig
from training.export import correct_schedule, export_model, marker

FOLDER, TARGET = "runs/small/checkpoints/0123", "runs/small/model"
CHECKPOINT = f"{FOLDER}/step-00000004-0001-0123abcd"
CARD = "---\nlibrary_name: diffusers\n---\n"
CLASSES = {"sdxl": StableDiffusionXLPipeline, "sd15": StableDiffusionPipeline}
NEW = {"sdxl": new_pipeline, "sd15": new_sd15_pipeline}


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd15")
    new_sd15_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(params=["sdxl", "sd15"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def base(family: str, tiny_pipeline: Path, sd15: Path) -> Path:
    return tiny_pipeline if family == "sdxl" else sd15


@functools.cache
def weights_of(family: str, seed: int = 5) -> dict[str, Tensor]:
    """What training made of a UNet: that of another seed than the base's."""
    return trained_weights(NEW[family](seed=seed))


@functools.cache
def adapters_of(family: str, lora: LoraConfig, seed: int = 0) -> dict[str, Tensor]:
    return trained_adapters(NEW[family](), lora, seed=seed)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a checkpoint of SDXL's whole UNet."""
    folder = tmp_path_factory.mktemp("written")
    assert write_checkpoint(Storage(str(folder)), FOLDER, 4, weights_of("sdxl")) == CHECKPOINT
    return folder


@pytest.fixture
def storage(written: Path, tmp_path: Path) -> Storage:
    """A copy of it."""
    return Storage(str(shutil.copytree(written, tmp_path / "storage")))


def export(storage: Storage, checkpoint: str, base: Path | ModelSource, lora: LoraConfig | None = None, **options):
    """Export it; gives the folder of the model."""
    source = base if isinstance(base, ModelSource) else ModelSource(str(base))
    config = ExportConfig(**options)
    export_model(storage, checkpoint=checkpoint, source=source, target=TARGET, card=CARD, config=config, lora=lora)
    folder = Path(storage.path(TARGET))
    assert (folder / marker(config)).is_file()
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(found.relative_to(folder)): found.read_bytes() for found in folder.rglob("*") if found.is_file()}


def same(unet: Any, weights: dict[str, Tensor]) -> bool:
    state = unet.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in state)


@torch.no_grad()
def predicted(unet: Any) -> Tensor:
    """What a UNet of either family makes of the same noise and prompt."""
    generator, config = torch.Generator().manual_seed(0), unet.config
    inputs: dict[str, Any] = {"encoder_hidden_states": torch.randn(2, 77, config.cross_attention_dim)}
    inputs["encoder_hidden_states"].normal_(generator=generator)
    if config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {"text_embeds": torch.ones(2, 24), "time_ids": torch.full((2, 6), 64.0)}
    return unet.float().eval()(torch.randn(2, 4, 16, 16, generator=generator), torch.tensor(300), **inputs).sample


def test_the_exported_pipeline_is_the_base_with_the_trained_unet(family: str, base: Path, storage: Storage) -> None:
    weights = weights_of(family)
    model = export(storage, write_checkpoint(storage, FOLDER, 8, weights), base)
    pipeline = CLASSES[family].from_pretrained(model, use_safetensors=True)
    assert same(pipeline.unet, weights)
    ours, theirs = files(model), files(base)
    assert ours.pop("README.md").decode() == CARD
    assert ours.keys() == theirs.keys()
    changed = {name for name, data in ours.items() if data != theirs[name]}
    assert changed == {"unet/diffusion_pytorch_model.safetensors"}


@pytest.mark.parametrize(("says", "override"), [("epsilon", "v_prediction"), (None, "v_prediction"), (None, "epsilon")])
def test_what_training_was_told_to_predict_is_the_only_key_that_an_export_changes(
    says: str | None, override: str, tiny_pipeline: Path, storage: Storage, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_pipeline, tmp_path / "base")
    file = base / "scheduler/scheduler_config.json"
    written = json.loads(file.read_text()) | {"prediction_type": says}
    file.write_text(
        json.dumps({key: value for key, value in written.items() if value is not None or key != "prediction_type"})
    )
    source = ModelSource(str(base))
    export_model(storage, checkpoint=CHECKPOINT, source=source, target=TARGET, card=CARD, prediction_type=override)
    exported = Path(storage.path(TARGET)) / "scheduler/scheduler_config.json"
    if override == (says or "epsilon"):
        assert exported.read_bytes() == file.read_bytes()
    else:
        assert json.loads(exported.read_text()) == written | {"prediction_type": override}
    assert StableDiffusionXLPipeline.from_pretrained(exported.parents[1]).scheduler.config.prediction_type == override


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler under NumPy 2
def test_samples_of_a_base_are_drawn_with_what_training_was_told(tiny_pipeline: Path, tmp_path: Path) -> None:
    right = shutil.copytree(tiny_pipeline, tmp_path / "right")
    correct_schedule(right / "scheduler/scheduler_config.json", "v_prediction")
    told = draw_here(tiny_pipeline, ["a cat"], [3], prediction_type="v_prediction")
    assert told == draw_here(right, ["a cat"], [3])
    assert told != draw_here(tiny_pipeline, ["a cat"], [3])


@pytest.mark.parametrize(("wanted", "is_average"), [("auto", True), ("ema", True), ("raw", False)])
def test_the_average_is_exported_unless_the_weights_themselves_are_asked_for(
    wanted: str, is_average: bool, tiny_pipeline: Path, storage: Storage
) -> None:
    weights, average = (weights_of("sdxl", seed) for seed in (5, 6))
    checkpoint = write_checkpoint(storage, FOLDER, 8, weights, average=average)
    model = export(storage, checkpoint, tiny_pipeline, weights=wanted, parts="unet")
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    assert same(unet, average if is_average else weights)


def test_without_an_average_the_weights_are_exported_and_asking_for_it_is_refused(
    tiny_pipeline: Path, storage: Storage
) -> None:
    model = export(storage, CHECKPOINT, tiny_pipeline, parts="unet")
    assert same(UNet2DConditionModel.from_pretrained(model, subfolder="unet"), weights_of("sdxl"))
    with pytest.raises(ModelError, match="has no moving average") as caught:
        export(storage, CHECKPOINT, tiny_pipeline, weights="ema")
    assert "export.weights" in str(caught.value.hint)


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=4),
        LoraConfig(rank=4, alpha=1.5),
        LoraConfig(rank=2, alpha=8, targets=("to_k", "ff.net.2", "conv1", "time_emb_proj")),
    ],
    ids=["plain", "scaled", "convolutions"],
)
def test_adapters_on_the_base_predict_what_the_merged_unet_predicts(
    lora: LoraConfig, family: str, base: Path, storage: Storage
) -> None:
    """Loaded by the family's own class, as a user would; the scale comes with them."""
    live = NEW[family]()
    adapters = trained_adapters(live, lora)
    model = export(storage, write_checkpoint(storage, FOLDER, 8, adapters), base, lora)
    merged = CLASSES[family].from_pretrained(model)
    on_base = CLASSES[family].from_pretrained(base)
    plain = predicted(on_base.unet)
    on_base.load_lora_weights(model / "lora")
    expected = predicted(on_base.unet)
    torch.testing.assert_close(predicted(merged.unet), expected, rtol=1e-4, atol=1e-4)
    live.unet.load_state_dict(adapters, strict=False)
    torch.testing.assert_close(predicted(live.unet), expected, rtol=1e-4, atol=1e-4)  # as it was trained
    assert (expected - plain).abs().mean() > 0.01
    assert merged.unet.state_dict().keys() == NEW[family]().unet.state_dict().keys(), "nothing of adapters is left"


def test_adapters_lie_beside_a_unet_alone_and_their_average_is_taken(tiny_pipeline: Path, storage: Storage) -> None:
    lora = LoraConfig(rank=4)
    weights, average = (adapters_of("sdxl", lora, seed) for seed in (1, 2))
    checkpoint = write_checkpoint(storage, FOLDER, 8, weights, average=average)
    model = export(storage, checkpoint, tiny_pipeline, lora, parts="unet")
    assert {name.partition("/")[0] for name in files(model)} == {"README.md", "unet", "lora"}
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_pipeline)
    pipeline.load_lora_weights(model / "lora")
    found = {name: weight for name, weight in pipeline.unet.named_parameters() if "lora" in name}
    assert [torch.equal(weight, average[name.replace("default_0", "default")]) for name, weight in found.items()] == [
        True
    ] * len(average)


def test_of_a_variant_the_export_is_plain_and_of_its_type(tmp_path: Path, storage: Storage) -> None:
    """Weights of the variant fp16 beside plain ones of another seed, which must not get in."""
    base, weights = tmp_path / "base", weights_of("sdxl")
    new_pipeline(seed=0).save_pretrained(base)
    half = new_pipeline(seed=1).to(dtype=torch.float16)
    half.save_pretrained(base, variant="fp16")
    model = export(storage, CHECKPOINT, ModelSource(str(base), variant="fp16"))
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, use_safetensors=True, dtype="auto")
    assert same(pipeline.unet, {name: weight.half() for name, weight in weights.items()})
    for part in ("vae", "text_encoder", "text_encoder_2"):
        assert same(getattr(pipeline, part), getattr(half, part).state_dict()), part
    assert not [name for name in files(model) if "fp16" in name]
    plain = files(export(storage, CHECKPOINT, base))
    assert not [name for name in plain if "fp16" in name]
    assert (
        plain["vae/diffusion_pytorch_model.safetensors"]
        == (base / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    )


def test_adapters_of_a_half_precision_base_are_merged_before_anything_is_rounded(
    tmp_path: Path, storage: Storage
) -> None:
    base, lora = tmp_path / "base", LoraConfig(rank=4)
    new_pipeline().to(dtype=torch.float16).save_pretrained(base)
    adapters = adapters_of("sdxl", lora)
    model = export(storage, write_checkpoint(storage, FOLDER, 8, adapters), base, lora, parts="unet")
    found = UNet2DConditionModel.from_pretrained(model, subfolder="unet", dtype="auto").state_dict()
    before = UNet2DConditionModel.from_pretrained(base, subfolder="unet", dtype=torch.float16).state_dict()
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    a, b = (adapters[f"{layer}.lora_{part}.default.weight"] for part in "AB")
    assert torch.equal(found[f"{layer}.weight"], (before[f"{layer}.weight"].float() + b @ a).half())


def with_checker(base: Path, folder: Path) -> Path:
    """SD 1.5 with a safety checker, as the released pipelines have it."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    shutil.copytree(base, folder)
    small: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    settings = CLIPConfig(
        vision_config={**small, "image_size": 8, "patch_size": 4}, text_config=small, projection_dim=8
    )
    StableDiffusionSafetyChecker(settings).save_pretrained(folder / "safety_checker")
    CLIPImageProcessor(size=8, crop_size=8).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_safety_checker_stays_and_what_the_pipeline_does_not_read_does_not_come_along(
    sd15: Path, storage: Storage, tmp_path: Path
) -> None:
    base = with_checker(sd15, tmp_path / "base")
    whole = files(base)
    for name in ("v1-5-pruned.safetensors", "v1-5.ckpt", "vae/diffusion_pytorch_model.bin", "unet/other.safetensors",
                 "vae/flax_model.msgpack", "unet_onnx/model.onnx", "README.md", ".cache/x"):  # fmt: skip
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"")
    (base / "LICENSE.md").write_text("terms")
    checkpoint = write_checkpoint(storage, FOLDER, 8, weights_of("sd15"))
    model = export(storage, checkpoint, base)
    assert files(model).keys() == {*whole, "README.md", "LICENSE.md"}
    assert StableDiffusionPipeline.from_pretrained(model).safety_checker is not None
    checker = base / "safety_checker"
    (checker / "model.safetensors").rename(checker / "pytorch_model.bin")
    assert "safety_checker/pytorch_model.bin" in files(export(storage, checkpoint, base)), "or it could not be loaded"


def test_another_vae_takes_the_place_of_the_pipelines_own(
    tiny_pipeline: Path, storage: Storage, tmp_path: Path
) -> None:
    vae = new_pipeline(seed=9).vae
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "sdxl_vae.safetensors").write_bytes(b"")
    model = export(storage, CHECKPOINT, ModelSource(str(tiny_pipeline), vae=str(tmp_path / "vae")))
    assert same(StableDiffusionXLPipeline.from_pretrained(model).vae, vae.state_dict())
    assert len(list((model / "vae").iterdir())) == 2


def test_of_an_older_export_nothing_stays(tiny_pipeline: Path, storage: Storage) -> None:
    lora = LoraConfig(rank=4)
    export(storage, write_checkpoint(storage, FOLDER, 8, adapters_of("sdxl", lora)), tiny_pipeline, lora)
    storage.write(f"{TARGET}/unet/diffusion_pytorch_model.safetensors.index.json", b"{}")  # diffusers would read it
    model = export(storage, CHECKPOINT, tiny_pipeline, parts="unet")
    assert files(model).keys() == {"README.md", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    whole = export(storage, CHECKPOINT, tiny_pipeline)
    assert files(whole).keys() == {*files(tiny_pipeline), "README.md"}


@pytest.mark.parametrize("parts", ["pipeline", "unet"])
def test_while_an_export_is_replaced_it_is_not_complete(
    parts: str, tiny_pipeline: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after any of its writes and deletions, it is no model of either kind, until the last one."""
    export(storage, CHECKPOINT, tiny_pipeline)
    marks = [f"{TARGET}/model_index.json", f"{TARGET}/unet/config.json"]
    seen: list[set[str]] = []

    def watched(method: Callable[..., None]) -> Callable[..., None]:
        def change(self: Storage, *arguments: Any) -> None:
            method(self, *arguments)
            seen.append({mark for mark in marks if storage.exists(mark)})

        return change

    for name in ("upload", "delete"):
        monkeypatch.setattr(Storage, name, watched(getattr(Storage, name)))
    export(storage, CHECKPOINT, tiny_pipeline, parts=parts)
    last = f"{TARGET}/{marker(ExportConfig(parts=parts))}"
    assert all(last not in each for each in seen[1:-1])
    assert marks[0] not in {mark for each in seen[:-1] for mark in each}, "no old index beside a new UNet"
    assert last in seen[-1]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e5])
def test_weights_that_are_no_numbers_are_refused(broken: float, tmp_path: Path, storage: Storage) -> None:
    """So is a number that is none in the type that the base is stored in; what was there stays."""
    base = tmp_path / "base"
    new_pipeline().to(dtype=torch.float16).save_pretrained(base)
    export(storage, CHECKPOINT, base, parts="unet")
    before = files(Path(storage.path(TARGET)))
    weights = weights_of("sdxl") | {"conv_in.bias": torch.tensor([broken, *[0.0] * 15])}
    with pytest.raises(TrainingError, match=r"1 of \d+ weights are not finite.*, conv_in.bias first") as caught:
        export(storage, write_checkpoint(storage, FOLDER, 8, weights), base, parts="unet")
    assert caught.value.hint
    assert files(Path(storage.path(TARGET))) == before


@pytest.mark.parametrize("damage", ["gone", "no manifest", "manifest", "cut", "flipped", "no index", "state"])
def test_a_missing_or_damaged_checkpoint_is_one_error_with_a_way_out(
    damage: str, tiny_pipeline: Path, storage: Storage
) -> None:
    folder = Path(storage.path(CHECKPOINT))
    tensors, manifest = folder / "rank-00001.safetensors", folder / "manifest.json"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"step": 4', '"step": 5'))
    elif damage in ("cut", "flipped"):
        tensors.write_bytes(data if damage == "flipped" else data[:-8])
    else:
        (folder / ("rank-00000.json" if damage == "no index" else "state.json")).unlink()
    expected = ModelError if damage in ("gone", "no manifest", "manifest") else ShardCorrupt
    with pytest.raises(MapoError) as caught:
        export(storage, CHECKPOINT, tiny_pipeline)
    assert type(caught.value) is expected
    assert CHECKPOINT in caught.value.message
    assert "mapo train" in str(caught.value.hint)
    assert not storage.exists(TARGET)


@pytest.mark.parametrize("case", ["adapters without lora", "other rank", "other base", "lora of a whole unet"])
def test_a_checkpoint_of_something_else_is_refused(
    case: str, tiny_pipeline: Path, sd15: Path, storage: Storage
) -> None:
    checkpoint, lora = CHECKPOINT, LoraConfig(rank=4)
    if case in ("adapters without lora", "other rank"):
        checkpoint = write_checkpoint(storage, FOLDER, 8, adapters_of("sdxl", lora))
    asked = {"other rank": LoraConfig(rank=8), "lora of a whole unet": lora}.get(case)
    with pytest.raises(ModelError, match="the checkpoint does not fit the UNet of") as caught:
        export(storage, checkpoint, sd15 if case == "other base" else tiny_pipeline, asked)
    assert "encode.model" in str(caught.value.hint)
    assert not storage.exists(TARGET)


def test_over_s3_it_is_the_same(tiny_pipeline: Path, s3_storage: Storage, storage: Storage, tmp_path: Path) -> None:
    s3_storage.upload_folder(CHECKPOINT, Path(storage.path(CHECKPOINT)))
    for stale in ("model_index.json", "vae/config.json", "unet/config.json"):
        s3_storage.write(f"{TARGET}/{stale}", b"{}")
    source, config = ModelSource(str(tiny_pipeline)), ExportConfig(parts="unet")
    export_model(s3_storage, checkpoint=CHECKPOINT, source=source, target=TARGET, card=CARD, config=config)
    s3_storage.download_folder(TARGET, found := tmp_path / "found")
    assert files(found).keys() == {"README.md", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert same(UNet2DConditionModel.from_pretrained(found, subfolder="unet"), weights_of("sdxl"))


def test_the_whole_folder_is_pushed_once_the_local_export_is_complete(
    tiny_pipeline: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: dict[str, Any] = {}

    class Hub:
        def create_repo(self, repository: str, **options: Any) -> None:
            pushed.update(repository=repository, **options)

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> None:
            pushed.update(to=repo_id, files=files(folder_path), local=files(Path(storage.path(TARGET))))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    export(storage, CHECKPOINT, tiny_pipeline, push_to_hub="me/aligned")
    assert pushed["repository"] == pushed["to"] == "me/aligned"
    assert pushed["private"] is True
    assert pushed["files"] == pushed["local"]
    assert "model_index.json" in pushed["files"]
