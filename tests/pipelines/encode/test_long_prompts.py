"""Prompts above 77 tokens: compel and diffusers are the judges, and what was stored before stays as it is."""

from pathlib import Path

import pytest
import torch
from encode_steps import encode_here, files_of, ingest_here
from factories import WORDS, new_pipeline, new_sd15_pipeline, photo_pairs, write_parquet
from long_prompts import LENGTH, LONG_PROMPTS, NUM_CHUNKS, RECORDED, TOKENIZERS, thinned, write_pipeline
from pydantic import ValidationError
from safetensors.torch import load, load_file

from orchestration.config import RunConfig
from orchestration.run.context import Run
from orchestration.stages import encode as encode_stage
from pipelines.config import EncodeConfig
from pipelines.dataset.layout import TEXT, text_table
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.pair import EMPTY_PROMPT_ID, NULL_PROMPT_ID, prompt_id
from pipelines.dataset.storage import Storage
from pipelines.encode import plan
from pipelines.encode.encoders import LatentEncoder, TextEncoder
from pipelines.encode.fingerprint import latents_fingerprint, noted_parts, text_fingerprint, text_parts
from pipelines.encode.plan import pending, prompts_a_unit
from pipelines.encode.stale import refusal
from pipelines.maintenance.describe import describe_encoding
from training.data.index import load_index, load_texts
from training.data.reader import PairReader
from training.loop import dropped_prompt
from training.spec import Snapshot

CPU = torch.device("cpu")
LONG = " ".join(WORDS[number % len(WORDS)] for number in range(130))
"""Each word is one token of the tiny tokenizers."""
PROMPTS = ["", "cat", " ".join(["cat"] * 75), LONG, " ".join(["dog"] * 400)]


@pytest.fixture(scope="module")
def chunked(tiny_pipeline: Path) -> TextEncoder:
    return TextEncoder(ModelSource(str(tiny_pipeline)), CPU, NUM_CHUNKS)


def bits(tensor: torch.Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.numpy().tobytes()


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="SDXL's own tokenizers are not here")
def test_chunks_are_embedded_as_compel_does(kind: str, tmp_path: Path) -> None:
    write_pipeline(kind, tmp_path / "model")
    found = TextEncoder(ModelSource(str(tmp_path / "model")), CPU, NUM_CHUNKS)(list(LONG_PROMPTS.values()))
    recorded, num_compared = load_file(RECORDED), 0
    for name, embedded in zip(LONG_PROMPTS, found, strict=True):
        assert embedded.prompt_embeds.shape[0] == NUM_CHUNKS * LENGTH
        ours = {"prompt_embeds": thinned(embedded.prompt_embeds), "pooled_prompt_embeds": embedded.pooled_prompt_embeds}
        for part in embedded.tensors:
            torch.testing.assert_close(ours[part], recorded[f"{kind}.{name}.{part}"], rtol=0, atol=1e-5)
            num_compared += 1
    assert num_compared == sum(name.startswith(f"{kind}.") for name in recorded)
    lengths = [embedded.num_tokens for embedded in found]
    assert (lengths[0], lengths[2], lengths[3], lengths[5]) == (2, 77, 78, 152)
    assert lengths[8] == 402 > NUM_CHUNKS * 75 + 2


@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="SDXL's own tokenizers are not here")
def test_one_of_these_prompts_is_cut_inside_a_word() -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZERS / "tokenizer")
    ids = tokenizer(LONG_PROMPTS["cut inside a word"]).input_ids[1:-1]
    assert tokenizer.convert_ids_to_tokens(ids[74:76]) == ["volu", "metric</w>"]


@pytest.mark.parametrize("batch_size", [1, len(PROMPTS)])
def test_the_first_chunk_has_the_bits_of_before(batch_size: int, text: TextEncoder, chunked: TextEncoder) -> None:
    for start in range(0, len(PROMPTS), batch_size):
        part = PROMPTS[start : start + batch_size]
        for before, now in zip(text(part), chunked(part), strict=True):
            assert bits(now.prompt_embeds[:LENGTH]) == bits(before.prompt_embeds)
            assert bits(now.pooled_prompt_embeds) == bits(before.pooled_prompt_embeds)
            assert now.num_tokens == before.num_tokens


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_a_later_chunk_is_what_diffusers_gives_for_its_words_alone(kind: str, tmp_path: Path) -> None:
    pipeline = new_pipeline() if kind == "sdxl" else new_sd15_pipeline()
    pipeline.save_pretrained(tmp_path / "model")
    encoder = TextEncoder(ModelSource(str(tmp_path / "model")), CPU, NUM_CHUNKS)
    for prompt, embedded in zip(PROMPTS, encoder(PROMPTS), strict=True):
        words = prompt.split()
        for place in range(NUM_CHUNKS):
            of_chunk = " ".join(words[75 * place : 75 * (place + 1)])
            expected, *_ = pipeline.encode_prompt(
                of_chunk, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            found = embedded.prompt_embeds[LENGTH * place : LENGTH * (place + 1)]
            torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("force_zeros", [True, False])
def test_the_null_conditioning_is_as_long_as_any_prompt(force_zeros: bool, tmp_path: Path) -> None:
    new_pipeline(force_zeros=force_zeros).save_pretrained(tmp_path / "model")
    one, three = (TextEncoder(ModelSource(str(tmp_path / "model")), CPU, count).null() for count in (1, NUM_CHUNKS))
    assert bool(one.prompt_embeds.any()) is not force_zeros
    torch.testing.assert_close(three.prompt_embeds, one.prompt_embeds.repeat(NUM_CHUNKS, 1), rtol=0, atol=1e-6)
    assert bits(three.pooled_prompt_embeds) == bits(one.pooled_prompt_embeds)


def test_later_chunks_take_no_larger_passes_than_the_first(tiny_pipeline: Path) -> None:
    """So that a batch that fits in memory with one chunk fits with any number of them."""
    encoder = TextEncoder(ModelSource(str(tiny_pipeline)), CPU, 6)
    sizes: list[int] = []
    model = encoder._pipeline.text_encoder_2
    model.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    long, short = " ".join(["dog"] * 400), "cat"
    encoder([long, short, long])
    assert sizes == [3, 3, 3, 3, 1], "10 further chunks with tokens"
    sizes.clear()
    encoder([short] * 4)
    assert sizes == [4], "empty chunks are embedded once, when the encoder is loaded"


def test_one_chunk_is_the_fingerprint_of_before_and_more_are_another(tiny_pipeline: Path) -> None:
    config = EncodeConfig(model=str(tiny_pipeline), resolution=64)
    one, two, three = (config.model_copy(update={"prompt_chunks": count}) for count in (1, 2, 3))
    assert text_parts(one) == text_parts(config)
    assert "prompt_chunks" not in text_parts(one)
    assert len({text_fingerprint(each) for each in (one, two, three)}) == 3
    assert len({latents_fingerprint(each) for each in (one, two, three)}) == 1


@pytest.mark.parametrize("value", [0, -1, 225, 1.5, "many"])
def test_a_number_of_chunks_that_cannot_be_is_refused(value: object) -> None:
    with pytest.raises(ValidationError, match="prompt_chunks"):
        EncodeConfig(model="m", prompt_chunks=value)


@pytest.fixture
def both(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder, text: TextEncoder, chunked: TextEncoder
) -> tuple[EncodeConfig, EncodeConfig]:
    """A storage whose prompts are embedded in one chunk, and then in three."""
    rows = photo_pairs(8, num_prompts=4, sizes=((64, 64),))
    for row, prompt in zip(rows, [*PROMPTS[1:], *PROMPTS[1:]], strict=True):
        row["caption"] = prompt
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", rows))
    encode_here(config, storage, vae, text, include_empty_prompt=True)
    before = files_of(storage)
    three = config.model_copy(update={"prompt_chunks": NUM_CHUNKS})
    todo = encode_here(three, storage, vae, chunked, include_empty_prompt=True)
    assert not todo.latents
    after = files_of(storage)
    assert {name: after[name] for name in before} == before, "what was stored before was touched"
    return config, three


def stored(storage: Storage, config: EncodeConfig) -> dict[str, dict[str, torch.Tensor]]:
    rows = text_table(storage, text_fingerprint(config)).read().to_pylist()
    ranges = {row["prompt_id"]: (row["shard"], row["offset"], row["length"], row["sha256"]) for row in rows}
    return {name: load(storage.read_range(*place)) for name, place in ranges.items()}


def test_stored_are_the_bytes_of_before_and_then_the_other_chunks(
    storage: Storage, both: tuple[EncodeConfig, EncodeConfig]
) -> None:
    one, three = (stored(storage, each) for each in both)
    assert one.keys() == three.keys() == {NULL_PROMPT_ID, EMPTY_PROMPT_ID, *map(prompt_id, PROMPTS[1:])}
    for name, tensors in three.items():
        assert bits(tensors["prompt_embeds"][:LENGTH]) == bits(one[name]["prompt_embeds"])
        assert bits(tensors["pooled_prompt_embeds"]) == bits(one[name]["pooled_prompt_embeds"])
        assert tensors["prompt_embeds"].shape == (NUM_CHUNKS * LENGTH, 40)


def test_what_is_cut_is_counted_and_the_plan_knows_the_bytes(
    storage: Storage, both: tuple[EncodeConfig, EncodeConfig]
) -> None:
    one, three = (describe_encoding(storage, latents_fingerprint(each), text_fingerprint(each)) for each in both)
    assert (one.max_tokens, one.truncated_prompts, one.longest_prompt) == (77, 2, 402)
    assert (three.max_tokens, three.truncated_prompts, three.longest_prompt) == (227, 1, 402)
    for config in both:
        lengths = text_table(storage, text_fingerprint(config)).read(["length"])["length"].to_pylist()
        (length,) = set(lengths)
        header = 200
        assert length - header < encode_stage._text_bytes(config) < length


def test_the_estimate_of_a_run_has_the_bytes_of_text(storage: Storage, both: tuple[EncodeConfig, EncodeConfig]) -> None:
    amounts = []
    for count in (2, 4):
        encode = both[0].model_copy(update={"prompt_chunks": count})
        config = RunConfig(name="photos", storage=storage.url, encode=encode)
        run = Run.open(config, lambda line: None, ("encode",))
        amounts.append(encode_stage.estimate(run, 0))
    assert [each["prompts"] for each in amounts] == [5, 5], "four prompts and the null conditioning"
    assert [each["text_bytes"] for each in amounts] == [5 * 2 * (40 * LENGTH * count + 24) for count in (2, 4)]
    assert [each["pairs"] for each in amounts] == [0, 0]


def test_embeddings_of_another_number_of_chunks_are_named(
    storage: Storage, both: tuple[EncodeConfig, EncodeConfig]
) -> None:
    found = refusal(both[0].model_copy(update={"prompt_chunks": 5}), storage)
    assert found is not None
    assert "prompt_chunks was 1, is 5" in found.message
    assert "prompt_chunks was 3, is 5" in found.message
    assert noted_parts(storage, TEXT, text_fingerprint(both[1]))["prompt_chunks"] == 3


def test_training_reads_prompts_of_all_lengths_in_one_batch(
    storage: Storage, both: tuple[EncodeConfig, EncodeConfig]
) -> None:
    config = both[1]
    snapshot = Snapshot(0, latents_fingerprint(config), 0, text_fingerprint(config), 1)
    reader = PairReader(storage, load_texts(storage, snapshot, include_empty_prompt=True))
    embeddings = stored(storage, config)
    index = load_index(storage, snapshot, "train", labels="soft")
    records = [index.pair(bucket, place) for bucket, size in enumerate(index.bucket_sizes) for place in range(size)]
    assert len({record.prompt_id for record in records}) > 1
    batch = reader.read(records)
    assert batch.prompt_embeds_BSD.shape == (len(records), NUM_CHUNKS * LENGTH, 40)
    for record, found in zip(records, batch.prompt_embeds_BSD, strict=True):
        assert torch.equal(found, embeddings[record.prompt_id]["prompt_embeds"])
    (null_SD, _), (empty_SD, _) = dropped_prompt(batch, reader, "auto"), dropped_prompt(batch, reader, "empty")
    assert torch.equal(null_SD, embeddings[NULL_PROMPT_ID]["prompt_embeds"])
    assert torch.equal(empty_SD, embeddings[EMPTY_PROMPT_ID]["prompt_embeds"])
    assert null_SD.shape == empty_SD.shape == batch.prompt_embeds_BSD.shape[1:]


def test_units_of_several_chunks_take_no_more_memory_and_begin_at_the_same_prompts(
    storage: Storage, both: tuple[EncodeConfig, EncodeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [prompts_a_unit(count) for count in range(1, 33)]
    assert sizes[:5] == [1024, 512, 256, 256, 128]
    for count, size in enumerate(sizes, start=1):
        assert 512 < size * count <= 1024
        assert 1024 % size == 0
    monkeypatch.setattr(plan, "PROMPTS_A_UNIT", 4)
    of_two = pending(both[0].model_copy(update={"prompt_chunks": 2}), storage).texts
    assert [unit.rows.num_rows for unit in of_two] == [2, 2, 1]
