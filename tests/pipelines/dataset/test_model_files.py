"""A base model by name: revisions, variants, and one fetch for all processes of a node."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from factories import new_pipeline

from pipelines.config import EncodeConfig
from pipelines.dataset.errors import ConfigError, ModelError
from pipelines.dataset.model_fetch import CACHE_VARIABLE, is_wanted
from pipelines.dataset.model_files import ModelSource, resolve_model, weight_files
from pipelines.dataset.storage import Storage
from pipelines.encode.encoders import LatentEncoder, TextEncoder
from pipelines.encode.fingerprint import latents_fingerprint, text_fingerprint
from pipelines.encode.plan import check_settings
from training.export import _give_plain_names
from training.model import load_base


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with float32 weights and, beside them, those of another seed in float16 as the variant fp16."""
    folder = tmp_path_factory.mktemp("model") / "variants"
    new_pipeline(seed=0).save_pretrained(folder)
    new_pipeline(seed=1).to(dtype=torch.float16).save_pretrained(folder, variant="fp16")
    return folder


def test_a_variant_is_its_own_weights_and_its_own_fingerprint(variants: Path, tmp_path: Path) -> None:
    plain = EncodeConfig(model=str(variants), resolution=64)
    half = plain.model_copy(update={"variant": "fp16"})
    assert latents_fingerprint(plain) != latents_fingerprint(half)
    assert text_fingerprint(plain) != text_fingerprint(half)
    alone = tmp_path / "alone"
    new_pipeline(seed=1).to(dtype=torch.float16).save_pretrained(alone)
    expected, found = ModelSource(str(alone)), half.source
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8).numpy()
    cpu = torch.device("cpu")
    assert torch.equal(LatentEncoder(found, device=cpu)(images), LatentEncoder(expected, device=cpu)(images))
    assert torch.equal(
        TextEncoder(found, cpu)(["a cat"])[0].prompt_embeds, TextEncoder(expected, cpu)(["a cat"])[0].prompt_embeds
    )
    ours, theirs = (load_base(source).unet.state_dict() for source in (found, expected))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert next(iter(ours.values())).dtype == torch.float32


def test_an_export_of_a_variant_loads_without_one(variants: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    shutil.copytree(variants / "vae", tmp_path / "vae")
    _give_plain_names(tmp_path / "vae", "diffusion_pytorch_model", "fp16")
    assert [file.name for file in (tmp_path / "vae").glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    found = AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict()
    expected = new_pipeline(seed=1).to(dtype=torch.float16).vae.state_dict()
    assert all(torch.equal(weight.half(), expected[name]) for name, weight in found.items())


def test_a_variant_that_is_not_there_says_what_is(tiny_pipeline: Path) -> None:
    config = EncodeConfig(model=str(tiny_pipeline), resolution=64, variant="fp16")
    with pytest.raises(ModelError, match=r"model.fp16.safetensors is missing; the folder contains") as caught:
        latents_fingerprint(config)
    assert "encode.variant" in str(caught.value.hint)


def test_weights_in_several_files_are_found_by_their_index(tmp_path: Path) -> None:
    part = tmp_path / "unet"
    new_pipeline().unet.save_pretrained(part, max_shard_size="200KB", variant="fp16")
    names = [file.name for file in weight_files(part, "diffusion_pytorch_model", "fp16")]
    assert names[0] == "diffusion_pytorch_model.safetensors.index.fp16.json"
    assert len(names) > 2


def test_a_revision_needs_the_hub(tiny_pipeline: Path) -> None:
    for model in (str(tiny_pipeline), "memory://models/any"):
        with pytest.raises(ModelError, match="only models on the hub have revisions"):
            ModelSource(model, revision="main").folder()
    with pytest.raises(ModelError, match=r"fetching nobody/nothing at revision v1\.0 from the hub failed"):
        ModelSource("nobody/nothing", revision="v1.0").folder()


ALWAYS = ("model_index.json", "vae/config.json", "tokenizer/merges.txt", "unet/model.safetensors.index.json")
PLAIN = ("vae/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model-00001-of-00002.safetensors")
HALF = ("vae/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors")
NEVER = (
    "sd_xl_base_1.0.safetensors", "unet/model.onnx", "vae_decoder/openvino_model.xml", "unet/flax_model.msgpack",
    "vae/diffusion_pytorch_model.bin", "text_encoder/model.onnx_data",
)  # fmt: skip


@pytest.mark.parametrize(("variant", "weights"), [(None, PLAIN), ("fp16", HALF)])
def test_of_a_repository_only_the_weights_that_count_are_fetched(variant: str | None, weights: tuple[str, ...]) -> None:
    fetched = [name for name in (*ALWAYS, *PLAIN, *HALF, *NEVER) if is_wanted(name, variant)]
    assert sorted(fetched) == sorted((*ALWAYS, *weights))


def test_the_processes_of_a_node_fetch_a_model_once(
    tiny_pipeline: Path, s3_storage: Storage, s3_server: dict[str, str], tmp_path: Path
) -> None:
    s3_storage.upload_folder("base", tiny_pipeline)
    code = f"""
from pipelines.dataset import model_fetch, model_files
fetched, fetch = [], model_fetch.fetch_file
model_fetch.fetch_file = lambda *each: (fetched.append(each[1]), fetch(*each))
print(model_files.resolve_model({s3_storage.uri("base")!r}), len(fetched))
"""
    environment = {**os.environ, **s3_server, CACHE_VARIABLE: str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    said = [process.communicate(timeout=400)[0].split() for process in started]
    folders, counts = {folder for folder, _ in said}, sorted(int(count) for _, count in said)
    assert len(folders) == 1
    files = {str(file.relative_to(tiny_pipeline)) for file in tiny_pipeline.rglob("*") if file.is_file()}
    assert counts == [0, 0, len(files)]
    (folder,) = folders
    for name in files:
        assert (Path(folder) / name).read_bytes() == (tiny_pipeline / name).read_bytes()
    assert not [file for file in (tmp_path / "cache" / "models").iterdir() if file.name.startswith(".fetch")]


def test_bytes_that_change_on_their_way_are_never_used(
    tiny_pipeline: Path, s3_storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    s3_storage.upload_folder("base", tiny_pipeline)
    get_file, damaged = S3FileSystem._get_file, []

    async def flipped(self: Any, source: str, target: str, *more: Any, **options: Any) -> None:
        await get_file(self, source, target, *more, **options)
        if source.endswith("vae/diffusion_pytorch_model.safetensors") and len(damaged) < 2:
            damaged.append(source)
            data = bytearray(Path(target).read_bytes())
            data[-1] ^= 1
            Path(target).write_bytes(data)

    monkeypatch.setattr(S3FileSystem, "_get_file", flipped)
    S3FileSystem.clear_instance_cache()  # an open one has bound the method
    folder = resolve_model(s3_storage.uri("base"))
    assert len(damaged) == 2
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (folder / name).read_bytes() == (tiny_pipeline / name).read_bytes()


def test_a_separate_vae_of_another_place_is_fetched_by_itself(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    fsspec.filesystem("memory").put(f"{tiny_pipeline}/vae/", "/vaes/fix/", recursive=True)
    config = EncodeConfig(model=str(tiny_pipeline), vae="memory://vaes/fix", resolution=64)
    assert latents_fingerprint(config) == latents_fingerprint(config.model_copy(update={"vae": None}))


def test_a_vae_that_overflows_in_float16_is_refused_before_any_work(tiny_pipeline: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_pipeline, model)
    config = EncodeConfig(model=str(model), resolution=64, vae_dtype="float16")
    check_settings(config)  # it says of itself that it does not overflow
    file = model / "vae/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"force_upcast": True}))
    with pytest.raises(ConfigError, match="force_upcast") as caught:
        check_settings(config)
    assert "bfloat16" in str(caught.value.hint)
    for dtype in ("float32", "tf32", "bfloat16"):
        check_settings(config.model_copy(update={"vae_dtype": dtype}))
