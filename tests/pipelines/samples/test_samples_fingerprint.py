"""A fingerprint of content: any byte that shapes a sample changes it, and no path does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from drawings import sampling_of

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.storage import Storage
from pipelines.samples.drawing import DrawnModel
from pipelines.samples.fingerprint import samples_fingerprint, samples_parts
from pipelines.samples.overlays import lora_file, unet_folder


def model_of(folder: Path | str, vae: Path | None = None, **options: Any) -> DrawnModel:
    return DrawnModel("m", ModelSource(str(folder), vae=None if vae is None else str(vae)), **options)


def of(folder: Path | str, sampling: dict[str, Any] | None = None, **options: Any) -> str:
    return samples_fingerprint(model_of(folder, **options), sampling_of(**(sampling or {})))


def test_a_copy_has_the_same_fingerprint_and_no_path_is_in_it(tiny_pipeline: Path, tmp_path: Path, lora: Path) -> None:
    copy = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    assert of(copy) == of(tiny_pipeline) == of(f"file://{copy}")
    other_lora = shutil.copytree(lora, tmp_path / "lora")
    options = {"unet": str(copy / "unet"), "vae": copy / "vae", "lora": str(other_lora)}
    parts = samples_parts(model_of(copy, **options), sampling_of())
    assert str(tmp_path) not in json.dumps(parts)
    assert of(copy, **options) == of(tiny_pipeline, unet=str(tiny_pipeline), vae=copy / "vae", lora=str(lora))
    assert samples_fingerprint(replace(model_of(copy), name="other"), sampling_of()) == of(copy)


@pytest.mark.parametrize(
    "sampling",
    [
        {"num_inference_steps": 3}, {"guidance_scale": 1.0}, {"negative_prompt": ""}, {"height": 32}, {"width": 32},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_changes_it(sampling: dict[str, Any], tiny_pipeline: Path) -> None:
    assert of(tiny_pipeline, sampling) != of(tiny_pipeline)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors", "text_encoder_2/config.json", "tokenizer/tokenizer.json",
        "tokenizer_2/tokenizer_config.json",
    ],
)  # fmt: skip
def test_every_file_of_the_pipeline_changes_it(file: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    data = bytearray((copy / file).read_bytes())
    if file.endswith(".json"):
        data = bytearray(json.dumps(json.loads(data), indent=7).encode())
    else:
        data[-1] ^= 1
    (copy / file).write_bytes(data)
    assert of(copy) != of(tiny_pipeline)


def test_what_lies_over_the_pipeline_changes_it(
    tiny_pipeline: Path, other_pipeline: Path, lora: Path, tmp_path: Path
) -> None:
    found = [
        of(tiny_pipeline), of(tiny_pipeline, unet=str(other_pipeline)), of(tiny_pipeline, lora=str(lora)),
        of(tiny_pipeline, vae=other_pipeline / "vae"), of(tiny_pipeline, prediction_type="v_prediction"),
        of(tiny_pipeline, identity="weights of an export"), of(tiny_pipeline, unet="any", identity="of a unet"),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    # The UNet that is replaced does not matter.
    copy = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    shutil.copy(*(each / "unet" / "diffusion_pytorch_model.safetensors" for each in (other_pipeline, copy)))
    assert of(copy, unet=str(other_pipeline)) == of(tiny_pipeline, unet=str(other_pipeline))


def test_with_an_identity_the_files_that_it_stands_for_are_not_read(tiny_pipeline: Path, other_pipeline: Path) -> None:
    nowhere = "/nowhere/at/all"
    assert of(nowhere, identity="a") != of(nowhere, identity="b")
    assert of(nowhere, identity="a", vae=other_pipeline / "vae") != of(nowhere, identity="a")
    over = of(tiny_pipeline, unet=nowhere, identity="a")
    assert over != of(other_pipeline, unet=nowhere, identity="a"), "an identity of a UNet says nothing of its pipeline"
    assert over == of(tiny_pipeline, unet="/somewhere/else", identity="a")


def test_parts_from_a_bucket_are_fetched_once(
    tiny_pipeline: Path, lora: Path, s3_storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "cache"))
    s3_storage.upload_folder("unet", tiny_pipeline / "unet")
    s3_storage.upload_folder("lora", lora)
    options = {"unet": s3_storage.uri("unet"), "lora": s3_storage.uri("lora")}
    assert of(tiny_pipeline, **options) == of(tiny_pipeline, unet=str(tiny_pipeline / "unet"), lora=str(lora))
    first = lora_file(model_of(tiny_pipeline, **options))
    assert first is not None
    stamp = first.stat().st_mtime_ns
    again = lora_file(model_of(tiny_pipeline, lora=s3_storage.uri("lora/pytorch_lora_weights.safetensors")))
    assert again == first
    assert again.stat().st_mtime_ns == stamp
    assert not list((tmp_path / "cache" / "loras").glob("*.part"))


@pytest.mark.parametrize(
    ("options", "words", "hint"),
    [
        ({"unet": "/nowhere"}, "there is no model folder /nowhere", ""),
        ({"unet": "{vae}"}, "does not fit", "a base of the same family"),
        ({"lora": "/nowhere/x.safetensors"}, "there is no LoRA /nowhere/x.safetensors", "check the path"),
        ({"lora": "/nowhere"}, "there is no LoRA in /nowhere: it has no safetensors file", "name the file"),
        ({"lora": "{unet}/../vae/config.safetensors"}, "there is no LoRA", "check the path"),
        ({"lora": "{two}"}, "it has 2 safetensors files: a.safetensors, b.safetensors", "name the file itself"),
        ({"lora": "{damaged}"}, "damaged.safetensors", ""),
    ],
)
def test_what_cannot_be_used_is_said(
    options: dict[str, str], words: str, hint: str, tiny_pipeline: Path, tmp_path: Path
) -> None:
    for name in ("two/a", "two/b", "damaged"):
        file = tmp_path / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"no tensors")
    places = {
        "vae": tiny_pipeline / "vae", "unet": tiny_pipeline / "unet", "two": tmp_path / "two",
        "damaged": tmp_path / "damaged.safetensors",
    }  # fmt: skip
    with pytest.raises(ModelError) as caught:
        of(tiny_pipeline, **{name: path.format(**places) for name, path in options.items()})
    assert words in caught.value.message
    assert hint in str(caught.value.hint)


def test_a_unet_of_another_family_is_refused(tiny_pipeline: Path, sd_pipeline: Path) -> None:
    with pytest.raises(ModelError, match="its `cross_attention_dim` is 32, not 40"):
        unet_folder(model_of(tiny_pipeline, unet=str(sd_pipeline)))
