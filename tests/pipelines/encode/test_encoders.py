"""Encoders: diffusers is the judge of every number; a bad model is one message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from factories import WORDS, new_pipeline, new_tokenizer
from PIL import Image

from pipelines.config import EncodeConfig
from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_fetch import CACHE_VARIABLE
from pipelines.dataset.model_files import ModelSource, resolve_model
from pipelines.encode.encoders import LatentEncoder, TextEncoder
from pipelines.encode.fingerprint import latents_fingerprint, text_fingerprint

REAL_TOKENIZERS = Path(__file__).parents[4] / "shared" / "sdxl"
PROMPTS = {
    "no token": "",
    "one token": "cat",
    "75 tokens": " ".join(["cat"] * 75),
    "76 tokens": " ".join(["cat"] * 75 + ["dog"]),
    "500 tokens": " ".join(WORDS[i % len(WORDS)] for i in range(500)),
    "emoji": "a cat 🐈‍⬛ at 🌃",
    "CJK": "山上の猫、夜 고양이",
    "white space": "  a \t cat\n\n",
}


@pytest.fixture(scope="module")
def full(tiny_pipeline: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(tiny_pipeline, dtype=torch.float32)


@pytest.fixture(scope="module")
def text_encoder(tiny_pipeline: Path) -> TextEncoder:
    return TextEncoder(ModelSource(str(tiny_pipeline)), torch.device("cpu"))


@torch.no_grad()
def test_prompts_are_embedded_as_diffusers_does(full: Any, text_encoder: TextEncoder) -> None:
    found = text_encoder(list(PROMPTS.values()))
    for prompt, embedded in zip(PROMPTS.values(), found, strict=True):
        embeds, _, pooled, _ = full.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        torch.testing.assert_close(embedded.prompt_embeds, embeds[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(embedded.pooled_prompt_embeds, pooled[0], rtol=0, atol=1e-6)
        assert embedded.prompt_embeds.shape == (77, 16 + 24)


def test_tokens_are_counted_before_truncation(text_encoder: TextEncoder) -> None:
    counts = [embedded.num_tokens for embedded in text_encoder(list(PROMPTS.values())[:5])]
    assert counts == [2, 3, 77, 78, 502]


@torch.no_grad()
def test_the_null_conditioning_is_what_diffusers_guides_away_from(full: Any, tmp_path: Path) -> None:
    for force_zeros in (True, False):
        new_pipeline(force_zeros=force_zeros).save_pretrained(tmp_path / str(force_zeros))
        null = TextEncoder(ModelSource(str(tmp_path / str(force_zeros))), torch.device("cpu")).null()
        full.register_to_config(force_zeros_for_empty_prompt=force_zeros)
        _, negative, _, negative_pooled = full.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True)
        torch.testing.assert_close(null.prompt_embeds, negative[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(null.pooled_prompt_embeds, negative_pooled[0], rtol=0, atol=1e-6)
        assert null.num_tokens == (0 if force_zeros else 2)
        assert bool(null.prompt_embeds.any()) is not force_zeros


@torch.no_grad()
def test_latents_are_the_posterior_mean_that_diffusers_gives(full: Any, tiny_pipeline: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 80, 3), dtype=np.uint8)
    latents = LatentEncoder(ModelSource(str(tiny_pipeline)), device=torch.device("cpu"))(pixels)
    for image, found in zip(pixels, latents, strict=True):
        expected = full.vae.encode(full.image_processor.preprocess(Image.fromarray(image))).latent_dist.mean[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert latents.shape == (3, 4, 12, 20)


@torch.no_grad()
@pytest.mark.skipif(not REAL_TOKENIZERS.is_dir(), reason="SDXL's own tokenizers are not here")
def test_sdxls_own_tokenizers_give_diffusers_embeddings(tmp_path: Path) -> None:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    pipeline = new_pipeline()
    tokenizers = [CLIPTokenizer.from_pretrained(REAL_TOKENIZERS / name) for name in ("tokenizer", "tokenizer_2")]
    encoders = []
    for kind, part in zip(
        (CLIPTextModel, CLIPTextModelWithProjection), (pipeline.text_encoder, pipeline.text_encoder_2), strict=True
    ):
        part.config.vocab_size = len(tokenizers[0])
        part.config.bos_token_id, part.config.eos_token_id = 49406, 49407
        encoders.append(kind(part.config))
    pipeline.register_modules(
        tokenizer=tokenizers[0], tokenizer_2=tokenizers[1], text_encoder=encoders[0], text_encoder_2=encoders[1]
    )
    pipeline.save_pretrained(tmp_path / "model")
    found = TextEncoder(ModelSource(str(tmp_path / "model")), torch.device("cpu"))(list(PROMPTS.values()))
    for prompt, embedded in zip(PROMPTS.values(), found, strict=True):
        embeds, _, pooled, _ = pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        torch.testing.assert_close(embedded.prompt_embeds, embeds[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(embedded.pooled_prompt_embeds, pooled[0], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.skipif(not REAL_TOKENIZERS.is_dir(), reason="SDXL's own configurations are not here")
def test_a_vae_of_full_size_gives_diffusers_latents(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor

    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(REAL_TOKENIZERS / "vae")).eval()
    vae.save_pretrained(tmp_path / "vae")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    found = LatentEncoder(ModelSource("unused/model", str(tmp_path / "vae")), device=torch.device("cpu"))(pixels)
    # As the official training scripts have it: the processor alone leaves the channels last, which costs 4e-6 here.
    images = VaeImageProcessor().preprocess(Image.fromarray(pixels[0])).contiguous()
    torch.testing.assert_close(found, vae.encode(images).latent_dist.mean, rtol=0, atol=1e-6)
    assert found.shape == (1, 4, 8, 12)


@torch.no_grad()
@pytest.mark.slow  # 3.3 GB of weights
@pytest.mark.skipif(not REAL_TOKENIZERS.is_dir(), reason="SDXL's own configurations are not here")
def test_text_encoders_of_full_size_give_diffusers_embeddings(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    pipeline = new_pipeline()
    parts: dict[str, Any] = {}
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        parts[name] = kind(CLIPTextConfig.from_pretrained(REAL_TOKENIZERS / name)).float().eval()
    for name in ("tokenizer", "tokenizer_2"):
        parts[name] = CLIPTokenizer.from_pretrained(REAL_TOKENIZERS / name)
    pipeline.register_modules(**parts)
    pipeline.save_pretrained(tmp_path / "model")
    prompts = list(PROMPTS.values())
    found = TextEncoder(ModelSource(str(tmp_path / "model")), torch.device("cpu"))(prompts)
    # In one pass like ours: a prompt by itself differs from it in diffusers too, by up to 1.1e-6.
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    for embedded, expected, expected_pooled in zip(found, embeds, pooled, strict=True):
        torch.testing.assert_close(embedded.prompt_embeds, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(embedded.pooled_prompt_embeds, expected_pooled, rtol=0, atol=1e-6)
        assert embedded.prompt_embeds.shape == (77, 2048)
        assert embedded.pooled_prompt_embeds.shape == (1280,)
    by_name = dict(zip(PROMPTS, found, strict=True))
    counts = [by_name[name].num_tokens for name in ("no token", "one token", "75 tokens", "76 tokens")]
    assert counts == [2, 3, 77, 78]


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("tf32", 1e-4), ("bfloat16", 0.05), ("float16", 0.01)])
def test_what_the_vae_computes_in_bounds_its_error(dtype: str, error: float, tiny_pipeline: Path) -> None:
    source, cpu = ModelSource(str(tiny_pipeline)), torch.device("cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    exact, found = LatentEncoder(source, device=cpu)(pixels), LatentEncoder(source, dtype, cpu)(pixels)
    assert found.dtype == torch.float32
    difference = (found - exact).abs().max()
    assert difference <= error * exact.abs().max()
    assert (difference > 0) == (dtype in ("bfloat16", "float16")) or dtype == "tf32"


def copied(model: Path, target: Path) -> Path:
    shutil.copytree(model, target)
    return target


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


LATENTS_CHANGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "a VAE weight": lambda model: flip_a_byte(model / "vae/diffusion_pytorch_model.safetensors") or {},
    "the VAE's configuration": lambda model: edit(model / "vae/config.json", scaling_factor=0.5) or {},
    "dtype": lambda model: {"dtype": "float32"},
    "resolution": lambda model: {"resolution": 128},
    "buckets": lambda model: {"buckets": False},
}
TEXT_CHANGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "the first encoder": lambda model: flip_a_byte(model / "text_encoder/model.safetensors") or {},
    "the second encoder": lambda model: flip_a_byte(model / "text_encoder_2/model.safetensors") or {},
    "a tokenizer": lambda model: edit(model / "tokenizer_2/tokenizer_config.json", pad_token="a") or {},
    "the null conditioning": lambda model: edit(model / "model_index.json", force_zeros_for_empty_prompt=False) or {},
    "dtype": lambda model: {"dtype": "float32"},
}
NO_CHANGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "nothing": lambda model: {},
    "the UNet": lambda model: flip_a_byte(model / "unet/diffusion_pytorch_model.safetensors") or {},
    "the scheduler": lambda model: edit(model / "scheduler/scheduler_config.json", steps_offset=0) or {},
    "workers and batches": lambda model: {"num_workers": 3, "batch_size": 1},
}


@pytest.mark.parametrize("what", sorted({*LATENTS_CHANGES, *TEXT_CHANGES, *NO_CHANGES}))
def test_a_fingerprint_changes_with_what_shapes_its_numbers_and_with_nothing_else(
    what: str, tiny_pipeline: Path, tmp_path: Path
) -> None:
    before = EncodeConfig(model=str(tiny_pipeline), resolution=64)
    model = copied(tiny_pipeline, tmp_path / "elsewhere")
    change = (LATENTS_CHANGES | TEXT_CHANGES | NO_CHANGES)[what]
    after = before.model_copy(update={"model": str(model), **change(model)})
    assert (latents_fingerprint(before) != latents_fingerprint(after)) == (what in LATENTS_CHANGES)
    assert (text_fingerprint(before) != text_fingerprint(after)) == (what in TEXT_CHANGES)


def test_another_vae_is_another_fingerprint_and_its_own_numbers(tiny_pipeline: Path, tmp_path: Path) -> None:
    other = new_pipeline(seed=1)
    other.vae.save_pretrained(tmp_path / "vae")
    other.save_pretrained(tmp_path / "pipeline")
    own = EncodeConfig(model=str(tiny_pipeline), resolution=64)
    separate = own.model_copy(update={"vae": str(tmp_path / "vae")})
    inside = own.model_copy(update={"vae": str(tmp_path / "pipeline")})
    assert latents_fingerprint(separate) == latents_fingerprint(inside) != latents_fingerprint(own)
    assert text_fingerprint(separate) == text_fingerprint(own)
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    with torch.no_grad():
        expected = other.vae.encode(torch.full((1, 3, 32, 32), -1.0)).latent_dist.mean
    found = LatentEncoder(ModelSource(str(tiny_pipeline), str(tmp_path / "vae")), device=torch.device("cpu"))(pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "there is no model folder"),
    "no model_index.json": (lambda model: (model / "model_index.json").unlink(), "no model_index.json"),
    "another pipeline": (
        lambda model: edit(model / "model_index.json", _class_name="FluxPipeline"),
        "is a FluxPipeline, not a StableDiffusionXLPipeline",
    ),
    "no VAE": (lambda model: shutil.rmtree(model / "vae"), "vae/config.json"),
    "another VAE": (
        lambda model: edit(model / "vae/config.json", _class_name="AutoencoderTiny"),
        "is a AutoencoderTiny, not an AutoencoderKL",
    ),
    "no VAE weights": (
        lambda model: (model / "vae/diffusion_pytorch_model.safetensors").rename(
            model / "vae/diffusion_pytorch_model.bin"
        ),
        "diffusion_pytorch_model.safetensors is missing; the folder contains diffusion_pytorch_model.bin",
    ),
    "cut VAE weights": (lambda model: cut(model / "vae/diffusion_pytorch_model.safetensors"), "is damaged"),
    "garbage for weights": (
        lambda model: (model / "text_encoder/model.safetensors").write_bytes(b"\x80\x02pickle" * 50),
        "is not a safetensors file",
    ),
    "no tokenizer": (lambda model: shutil.rmtree(model / "tokenizer_2"), "tokenizer_2 is missing"),
    "damaged index": (lambda model: (model / "model_index.json").write_text("{"), "cannot read"),
}


@pytest.mark.parametrize("what", BAD_MODELS)
def test_a_bad_model_is_one_message_with_a_way_out(what: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    damage, message = BAD_MODELS[what]
    model = copied(tiny_pipeline, tmp_path / "model")
    damage(model)
    config = EncodeConfig(model=str(model), resolution=64)
    with pytest.raises(ModelError) as caught:
        latents_fingerprint(config), text_fingerprint(config)
    assert message in caught.value.message
    assert caught.value.hint


def test_weights_that_lack_a_tensor_are_refused_and_never_random(tiny_pipeline: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = copied(tiny_pipeline, tmp_path / "model")
    for file in (model / "vae/diffusion_pytorch_model.safetensors", model / "text_encoder/model.safetensors"):
        tensors = load_file(file)
        del tensors[sorted(tensors)[0]]
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are missing from the weights of the VAE"):
        LatentEncoder(ModelSource(str(model)), device=torch.device("cpu"))
    with pytest.raises(ModelError, match=r"1 tensors are missing from the weights of the text_encoder"):
        TextEncoder(ModelSource(str(model)), torch.device("cpu"))


def test_a_hub_id_without_a_network_says_so() -> None:
    with pytest.raises(ModelError, match="from the hub failed") as caught:
        resolve_model("nobody/no-such-model")
    assert "network" in str(caught.value.hint)


def test_a_url_is_fetched_once_for_each_state(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    remote = fsspec.filesystem("memory")
    remote.put(str(tiny_pipeline) + "/", "/models/tiny/", recursive=True)
    folder = resolve_model("memory://models/tiny")
    stamps = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert resolve_model("memory://models/tiny") == folder
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == stamps
    config = EncodeConfig(model="memory://models/tiny", resolution=64)
    assert latents_fingerprint(config) == latents_fingerprint(config.model_copy(update={"model": str(tiny_pipeline)}))
    remote.pipe_file("/models/tiny/more.txt", b"changed")
    assert resolve_model("memory://models/tiny") != folder
    with pytest.raises(ModelError, match="there is no model"):
        resolve_model("memory://models/none")


def test_the_tests_own_tokenizer_has_one_token_for_a_word() -> None:
    assert len(new_tokenizer("!")(" ".join(WORDS)).input_ids) == len(WORDS) + 2
