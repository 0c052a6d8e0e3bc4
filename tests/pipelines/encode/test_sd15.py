"""A base of Stable Diffusion 1.5's architecture through encode and its pictures: diffusers is the judge of numbers."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encode_steps import encode_here, ingest_here
from factories import WORDS, new_sd15_pipeline, photo_pairs, write_parquet
from PIL import Image
from safetensors.torch import load
from sampled import draw_here

from orchestration.stages.contact_sheet import _decode, choose_pairs
from pipelines.config import EncodeConfig
from pipelines.dataset.errors import ConfigError, ModelError
from pipelines.dataset.layout import latents_table, pairs_table, text_table
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.pair import NULL_PROMPT_ID
from pipelines.dataset.storage import Storage
from pipelines.encode.encoders import LatentEncoder, TextEncoder
from pipelines.encode.fingerprint import latents_fingerprint, text_fingerprint
from pipelines.encode.geometry import open_image, place
from pipelines.encode.plan import check_settings, pending
from pipelines.encode.stale import refusal

CPU = torch.device("cpu")
REAL = Path(__file__).parents[4] / "shared" / "sdxl"  # SDXL's first tokenizer and text encoder are those of SD 1.5
PROMPTS = (
    "", "cat", " ".join(["cat"] * 75), " ".join(["cat"] * 75 + ["dog"]), "a cat 🐈‍⬛ at 🌃", "山上の猫",
    " ".join(WORDS[i % len(WORDS)] for i in range(500)),
)  # fmt: skip


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random pipeline with a safety checker that paints every image black."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    pipeline = new_sd15_pipeline()
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(vision_config={**vision, "image_size": 32, "patch_size": 16}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config).eval()
    checker.concept_embeds_weights.data.fill_(-2)  # of thresholds: nothing is so unlike a concept
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    pipeline.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessor(**size))
    pipeline.register_to_config(requires_safety_checker=True)
    folder = tmp_path_factory.mktemp("model") / "tiny-sd15"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def full(sd15: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(sd15, dtype=torch.float32)


@pytest.fixture(scope="module")
def text_encoder(sd15: Path) -> TextEncoder:
    return TextEncoder(ModelSource(str(sd15)), CPU)


@pytest.fixture
def sd15_config(sd15: Path) -> EncodeConfig:
    return EncodeConfig(model=str(sd15), resolution=64, batch_size=4)


@torch.no_grad()
def test_prompts_are_embedded_as_diffusers_does(full: Any, text_encoder: TextEncoder) -> None:
    for prompt, embedded in zip(PROMPTS, text_encoder(list(PROMPTS)), strict=True):
        expected, _ = full.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
        torch.testing.assert_close(embedded.prompt_embeds, expected[0], rtol=0, atol=1e-6)
        assert embedded.prompt_embeds.shape == (77, 32)
        assert set(embedded.tensors) == {"prompt_embeds"}
    assert [embedded.num_tokens for embedded in text_encoder(list(PROMPTS[:4]))] == [2, 3, 77, 78]


@torch.no_grad()
def test_the_null_conditioning_is_what_diffusers_guides_away_from(full: Any, text_encoder: TextEncoder) -> None:
    _, negative = full.encode_prompt("a cat", "cpu", 1, do_classifier_free_guidance=True)
    null = text_encoder.null()
    torch.testing.assert_close(null.prompt_embeds, negative[0], rtol=0, atol=1e-6)
    assert bool(null.prompt_embeds.any()), "zeros are SDXL's"
    assert (null.pooled_prompt_embeds, null.num_tokens) == (None, 2)


@torch.no_grad()
@pytest.mark.slow  # half a GB of weights
@pytest.mark.skipif(not REAL.is_dir(), reason="SDXL's own configurations are not here")
def test_a_text_encoder_of_full_size_gives_diffusers_embeddings(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    pipeline = new_sd15_pipeline()
    encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(REAL / "text_encoder")).float().eval()
    pipeline.register_modules(tokenizer=CLIPTokenizer.from_pretrained(REAL / "tokenizer"), text_encoder=encoder)
    pipeline.save_pretrained(tmp_path / "model")
    found = TextEncoder(ModelSource(str(tmp_path / "model")), CPU)(list(PROMPTS))
    expected, _ = pipeline.encode_prompt(list(PROMPTS), "cpu", 1, do_classifier_free_guidance=False)
    for embedded, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(embedded.prompt_embeds, theirs, rtol=0, atol=1e-6)
        assert embedded.prompt_embeds.shape == (77, 768)


@torch.no_grad()
def test_every_member_is_what_diffusers_gives_and_holds_nothing_pooled(
    tmp_path: Path, storage: Storage, sd15: Path, sd15_config: EncodeConfig, full: Any, text_encoder: TextEncoder
) -> None:
    # Batches of one: a convolution's last bits depend on the size of the batch.
    config = sd15_config.model_copy(update={"dtype": "float32", "batch_size": 1})
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(5, num_prompts=3)))
    check_settings(config)
    encode_here(config, storage, LatentEncoder(ModelSource(str(sd15)), device=CPU), text_encoder)
    assert pending(config, storage).is_empty
    pairs = pairs_table(storage).read().to_pylist()
    prompts = {row["prompt_id"]: row["prompt"] for row in pairs} | {NULL_PROMPT_ID: ""}
    texts = text_table(storage, text_fingerprint(config)).read().to_pylist()
    assert {row["prompt_id"] for row in texts} == set(prompts)
    for row in texts:
        tensors = load(storage.read_range(row["shard"], row["offset"], row["length"], row["sha256"]))
        expected, _ = full.encode_prompt(prompts[row["prompt_id"]], "cpu", 1, do_classifier_free_guidance=False)
        assert set(tensors) == {"prompt_embeds"}
        torch.testing.assert_close(tensors["prompt_embeds"], expected[0], rtol=0, atol=1e-6)
    places = {row["pair_key"]: row for row in pairs}
    for row in latents_table(storage, latents_fingerprint(config)).read().to_pylist():
        tensors, pair = load(storage.read_range(row["shard"], row["offset"], row["length"])), places[row["pair_key"]]
        for side in (0, 1):
            file = storage.read_range(pair["shard"], pair[f"offset_{side}"], pair[f"length_{side}"])
            pixels = place(open_image(file), (row["bucket_height"], row["bucket_width"])).pixels
            image = full.image_processor.preprocess(Image.fromarray(pixels)).contiguous()
            mean = full.vae.encode(image).latent_dist.mean[0]
            torch.testing.assert_close(tensors[f"latents_{side}"], mean, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_contact_sheet_shows_what_diffusers_decodes(
    tmp_path: Path, storage: Storage, sd15: Path, sd15_config: EncodeConfig, full: Any, text_encoder: TextEncoder
) -> None:
    config = sd15_config.model_copy(update={"dtype": "float32"})
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(2)))
    encode_here(config, storage, LatentEncoder(ModelSource(str(sd15)), device=CPU), text_encoder)
    sheet = _decode(config, storage, choose_pairs(storage, latents_fingerprint(config)))
    assert len(sheet) == 4
    for image in sheet:
        pixels = full.image_processor.preprocess(Image.fromarray(image.source_HWC))
        scaled = full.vae.encode(pixels).latent_dist.mean * full.vae.config.scaling_factor
        expected = full.image_processor.postprocess(full.vae.decode(scaled / 0.18215).sample, "np")[0]
        assert np.abs(image.decoded_HWC / 255 - expected).max() <= 1 / 255


def test_samples_are_the_pipelines_own_and_no_checker_paints_over_them(sd15: Path, full: Any) -> None:
    from diffusers import StableDiffusionPipeline

    found = draw_here(sd15, ["a cat", "a dog"], [3, 4])
    without = StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None, requires_safety_checker=False)
    for pipeline, is_black in ((without, False), (full, True)):
        pipeline.set_progress_bar_config(disable=True)
        seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        theirs = pipeline(
            ["a cat", "a dog"], height=64, width=64, num_inference_steps=2, guidance_scale=5.0,
            generator=seeds,
        ).images  # fmt: skip
        assert all(not np.asarray(image).any() for image in theirs) == is_black
        ours = [np.asarray(Image.open(io.BytesIO(png))) for png in found]
        assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(ours, theirs, strict=True)) != is_black


def test_a_repository_as_those_of_2022_gives_the_same_numbers(sd15: Path, tmp_path: Path) -> None:
    """Configurations that leave out what had no name then, a class that is gone, and a tensor too many."""
    from safetensors.torch import load_file, save_file

    old = tmp_path / "old"
    shutil.copytree(sd15, old)
    edit(old / "model_index.json", "requires_safety_checker", "image_encoder", _diffusers_version="0.6.0",
         feature_extractor=["transformers", "CLIPFeatureExtractor"])  # fmt: skip
    edit(old / "vae/config.json", "scaling_factor", "force_upcast", "latents_mean", _diffusers_version="0.6.0")
    edit(old / "unet/config.json", "addition_embed_type", _diffusers_version="0.6.0", sample_size=64)
    weights = load_file(old / "text_encoder/model.safetensors")
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(weights | positions, old / "text_encoder/model.safetensors", {"format": "pt"})
    ours, theirs = (ModelSource(str(folder)) for folder in (old, sd15))
    texts = [TextEncoder(source, CPU)(["a cat"])[0].prompt_embeds for source in (ours, theirs)]
    assert torch.equal(*texts)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    assert torch.equal(*(LatentEncoder(source, device=CPU)(images) for source in (ours, theirs)))
    samples = [draw_here(source.model, ["a cat"], [3]) for source in (ours, theirs)]
    assert samples[0] == samples[1]


# Fingerprints


def test_the_fingerprints_of_sdxl_are_what_they_were_when_it_was_the_only_family(tmp_path: Path) -> None:
    """Of files with these very bytes: what is encoded on someone's storage must not become stale."""
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    weights = len(header).to_bytes(8, "little") + header + bytes(4)
    encoders = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    index = {"_class_name": "StableDiffusionXLPipeline"} | {part: ["transformers", encoders[part]] for part in encoders}
    files = {"model_index.json": json.dumps(index).encode(), "vae/config.json": b'{"_class_name": "AutoencoderKL"}'}
    files["vae/diffusion_pytorch_model.safetensors"] = weights
    files |= {f"{part}/config.json": b"{}" for part in encoders}
    files |= {f"{part}/model.safetensors": weights for part in encoders}
    files |= {f"{part}/vocab.json": part.encode() for part in ("tokenizer", "tokenizer_2")}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    config = EncodeConfig(model=str(tmp_path), resolution=64, buckets=False)
    assert latents_fingerprint(config) == "33fda12847984001b78a950da971962e"
    assert text_fingerprint(config) == "88f9820485096dfbe28aa580f37905e4"


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def edit(file: Path, *left_out: str, **values: Any) -> None:
    found = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in found.items() if key not in left_out}))


CHANGES: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "the VAE": (lambda model: flip_a_byte(model / "vae/diffusion_pytorch_model.safetensors"), {"latents"}),
    "the text encoder": (lambda model: flip_a_byte(model / "text_encoder/model.safetensors"), {"text"}),
    "the tokenizer": (lambda model: edit(model / "tokenizer/tokenizer_config.json", pad_token="a"), {"text"}),
    "the UNet": (lambda model: flip_a_byte(model / "unet/diffusion_pytorch_model.safetensors"), set()),
    "the safety checker": (lambda model: shutil.rmtree(model / "safety_checker"), set()),
    "SDXL's setting": (lambda model: edit(model / "model_index.json", force_zeros_for_empty_prompt=True), set()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_fingerprint_changes_with_what_shapes_its_numbers_and_with_nothing_else(
    what: str, sd15: Path, sd15_config: EncodeConfig, tmp_path: Path
) -> None:
    change, changed = CHANGES[what]
    model = tmp_path / "elsewhere"
    shutil.copytree(sd15, model)
    change(model)
    after = sd15_config.model_copy(update={"model": str(model)})
    assert (latents_fingerprint(sd15_config) != latents_fingerprint(after)) == ("latents" in changed)
    assert (text_fingerprint(sd15_config) != text_fingerprint(after)) == ("text" in changed)


def test_two_families_share_the_latents_of_one_vae_and_never_a_text(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: Any, text: Any, sd15_config: EncodeConfig
) -> None:
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(2)))
    encode_here(config, storage, vae, text)
    other = sd15_config.model_copy(update={"vae": config.model})
    assert latents_fingerprint(other) == latents_fingerprint(config)
    error = refusal(other, storage)
    assert error is not None
    message = str(error)
    assert "latents" not in message
    assert "3 prompts have no text embeddings" in message
    assert "pipeline was StableDiffusionXLPipeline, is StableDiffusionPipeline" in message
    assert "text_encoder_2 was 2 files, is nothing" in message
    assert "{" not in message


# Refusals


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline", ["my_pipeline", "MyPipeline"], None])
def test_another_family_is_one_error_that_names_those_there_are(name: Any, sd15: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(sd15, model)
    edit(model / "model_index.json", _class_name=name)
    config = EncodeConfig(model=str(model), resolution=64)
    asked: tuple[Callable[[], Any], ...] = (
        lambda: check_settings(config),
        lambda: latents_fingerprint(config),
        lambda: text_fingerprint(config),
        lambda: TextEncoder(config.source, CPU),
        lambda: draw_here(model, ["a cat"], [3]),
    )
    for ask in asked:
        with pytest.raises(ModelError) as caught:
            ask()
        expected = f"{model} is a {name}, not a StableDiffusionXLPipeline or a StableDiffusionPipeline"
        assert caught.value.message == expected
        assert caught.value.hint == "choose a base of SDXL or of Stable Diffusion 1.x and 2.x"


def test_a_pipeline_without_its_text_encoder_is_refused(sd15: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(sd15, model)
    edit(model / "model_index.json", text_encoder=[None, None])
    with pytest.raises(ModelError, match=r"the text_encoder of .* is None, not CLIPTextModel"):
        text_fingerprint(EncodeConfig(model=str(model), resolution=64))


def test_a_vae_that_may_overflow_is_not_sent_to_sdxls(sd15_config: EncodeConfig) -> None:
    with pytest.raises(ConfigError, match="force_upcast") as caught:
        check_settings(sd15_config.model_copy(update={"vae_dtype": "float16"}))
    assert "sdxl" not in str(caught.value.hint)
