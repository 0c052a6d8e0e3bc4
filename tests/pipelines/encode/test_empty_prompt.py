"""The embedding of "": stored where a training wants it, and unseen by all the others."""

from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from encode_steps import CountingTexts, encode_here, files_of, ingest_here
from factories import photo_pairs, write_parquet

from orchestration.config import RunConfig
from orchestration.run.context import Run
from orchestration.stages import encode as encode_stage
from orchestration.stages import train as train_stage
from orchestration.stages.train import train_spec
from pipelines.config import EncodeConfig
from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import pairs_table, text_table
from pipelines.dataset.pair import EMPTY_PROMPT_ID, NULL_PROMPT_ID, prompt_id
from pipelines.dataset.storage import Storage
from pipelines.encode.empty_prompt import text_version_without_empty_prompt
from pipelines.encode.encoders import LatentEncoder, TextEncoder
from pipelines.encode.fingerprint import latents_fingerprint, text_fingerprint
from pipelines.encode.plan import is_encoded, pending
from pipelines.maintenance.describe import describe_encoding
from pipelines.maintenance.verify import verify
from training.config import TrainConfig
from training.data.index import load_texts
from training.data.reader import PairReader
from training.spec import Snapshot


@pytest.fixture
def encoded(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder, text: TextEncoder
) -> EncodeConfig:
    """Pairs that were encoded without it."""
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(4, num_prompts=2)))
    encode_here(config, storage, vae, text)
    return config


def run_of(storage: Storage, config: EncodeConfig, null_prompt: str) -> Run:
    train = TrainConfig(
        null_prompt=null_prompt, prompt_dropout=0.2, global_batch_size=2, micro_batch_size=1, max_steps=1
    )
    config = RunConfig(name=f"with-{null_prompt}", storage=storage.url, encode=config, train=train)
    return Run.open(config, lambda line: None, ("train",))


def test_no_kept_pair_can_have_its_id(tmp_path: Path, storage: Storage) -> None:
    rows = photo_pairs(4)
    for row, prompt in zip(rows, ("", " ", "\n", "a cat"), strict=True):
        row["caption"] = prompt
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", rows))
    found = pairs_table(storage).read(["prompt_id", "status", "reason"]).to_pylist()
    assert [row["status"] for row in found] == [*["quarantined"] * 3, "kept"]
    assert {row["prompt_id"] for row in found if row["status"] == "kept"} == {prompt_id("a cat")}
    assert EMPTY_PROMPT_ID == prompt_id("") != NULL_PROMPT_ID


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_stored_is_what_diffusers_gives_for_the_empty_string(
    dtype: str, tiny_pipeline: Path, tmp_path: Path, storage: Storage, vae: LatentEncoder, text: TextEncoder
) -> None:
    from diffusers import StableDiffusionXLPipeline

    config = EncodeConfig(model=str(tiny_pipeline), resolution=64, batch_size=4, dtype=dtype)
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(2)))
    encode_here(config, storage, vae, text, include_empty_prompt=True)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_pipeline)
    embeds, _, pooled, _ = pipeline.encode_prompt("", device="cpu", do_classifier_free_guidance=False)
    rows = text_table(storage, text_fingerprint(config)).read().to_pylist()
    (row,) = (row for row in rows if row["prompt_id"] == EMPTY_PROMPT_ID)
    assert (row["status"], row["num_tokens"]) == ("kept", 2)
    found = safetensors.torch.load(storage.read_range(row["shard"], row["offset"], row["length"], row["sha256"]))
    bound = {"float32": 1e-6, "float16": 2e-3}[dtype]
    torch.testing.assert_close(found["prompt_embeds"].float(), embeds[0], rtol=bound, atol=bound)
    torch.testing.assert_close(found["pooled_prompt_embeds"].float(), pooled[0], rtol=bound, atol=bound)
    assert embeds.any(), "the null conditioning of this pipeline is zeros"


def test_it_is_one_unit_more_and_changes_nothing_else(
    storage: Storage, encoded: EncodeConfig, vae: LatentEncoder, text: TextEncoder
) -> None:
    assert pending(encoded, storage).is_empty
    assert is_encoded(encoded, storage)
    assert not is_encoded(encoded, storage, include_empty_prompt=True)
    todo = pending(encoded, storage, include_empty_prompt=True)
    assert todo.latents == []
    assert [unit.rows.to_pylist() for unit in todo.texts] == [[{"prompt_id": EMPTY_PROMPT_ID, "prompt": ""}]]
    before, counting = files_of(storage), CountingTexts(text)
    encode_here(encoded, storage, vae, counting, include_empty_prompt=True)
    assert counting.prompts == [""]
    after = files_of(storage)
    assert {name: after[name] for name in before} == before
    assert pending(encoded, storage, include_empty_prompt=True).is_empty
    assert pending(encoded, storage).is_empty
    assert is_encoded(encoded, storage, include_empty_prompt=True)
    assert is_encoded(encoded, storage)
    assert verify(storage) == []
    facts = describe_encoding(storage, latents_fingerprint(encoded), text_fingerprint(encoded))
    assert facts.prompts == 2, "it is no prompt of the data set"


def test_with_it_from_the_start_the_other_units_are_the_same(
    tmp_path: Path, storage: Storage, config: EncodeConfig
) -> None:
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(4, num_prompts=2)))
    plain, more = (pending(config, storage, include_empty_prompt=each) for each in (False, True))
    assert [unit.id for unit in more.texts[:-1]] == [unit.id for unit in plain.texts]
    assert [unit.id for unit in more.latents] == [unit.id for unit in plain.latents]
    assert len(more.texts) == len(plain.texts) + 1


def test_a_record_of_before_does_not_hide_that_it_is_missing(
    storage: Storage, encoded: EncodeConfig, vae: LatentEncoder, text: TextEncoder
) -> None:
    plain, wanting = run_of(storage, encoded, "auto"), run_of(storage, encoded, "empty")
    for run in (plain, wanting):
        versions = encode_stage.versions(plain, pairs_table(storage).version, encode_stage.fingerprints(plain))
        run.journal.finish("encode", key="k", summary="", seconds=0.0, details={"versions": versions})
    assert encode_stage.look(plain).is_done
    assert not encode_stage.look(wanting).is_done
    assert train_spec(wanting) is None
    refused = train_stage.look(wanting).refusal
    assert refused is not None
    assert 'the embedding of "", which `train.null_prompt: empty` needs for dropped prompts' in refused.message
    assert "mapo encode" in str(refused.hint)
    encode_here(encoded, storage, vae, text, include_empty_prompt=True)
    assert encode_stage.look(wanting).is_done
    assert train_stage.look(wanting).refusal is None
    versions = encode_stage.versions(wanting, pairs_table(storage).version, encode_stage.fingerprints(wanting))
    wanting.journal.finish("encode", key="k", summary="", seconds=0.0, details={"versions": versions})
    assert encode_stage.look(wanting).is_done
    assert encode_stage.look(plain).is_done


def test_another_training_on_the_storage_does_not_notice(
    tmp_path: Path, storage: Storage, encoded: EncodeConfig, vae: LatentEncoder, text: TextEncoder
) -> None:
    plain, wanting, name = (
        run_of(storage, encoded, "auto"),
        run_of(storage, encoded, "empty"),
        text_fingerprint(encoded),
    )
    before = train_spec(plain)
    assert before is not None
    encode_here(encoded, storage, vae, text, include_empty_prompt=True)
    assert text_table(storage, name).version == before.snapshot.text_version + 1
    after, wants = train_spec(plain), train_spec(wanting)
    assert after is not None
    assert wants is not None
    assert after.key == before.key
    assert wants.snapshot.text_version == text_table(storage, name).version
    assert asdict(wants.snapshot) | {"text_version": 0} == asdict(before.snapshot) | {"text_version": 0}
    ingest_here(storage, write_parquet(tmp_path / "more.parquet", photo_pairs(2, seed=5)))
    encode_here(encoded, storage, vae, text, include_empty_prompt=True)
    newest = text_table(storage, name).version
    assert text_version_without_empty_prompt(storage, name) == newest, "prompts came after it"


def test_training_without_it_names_what_makes_it(
    storage: Storage, encoded: EncodeConfig, vae: LatentEncoder, text: TextEncoder
) -> None:
    snapshot = Snapshot(0, latents_fingerprint(encoded), 0, text_fingerprint(encoded), 0)
    with pytest.raises(SnapshotError, match='have no embedding of ""') as caught:
        load_texts(storage, snapshot, include_empty_prompt=True)
    assert "mapo encode" in str(caught.value.hint)
    encode_here(encoded, storage, vae, text, include_empty_prompt=True)
    snapshot = Snapshot(0, latents_fingerprint(encoded), 0, text_fingerprint(encoded), 1)
    reader = PairReader(storage, load_texts(storage, snapshot, include_empty_prompt=True))
    (expected,) = text([""])
    embeds, pooled = reader.empty_conditioning
    assert torch.equal(embeds, expected.prompt_embeds.half())
    assert torch.equal(pooled, expected.pooled_prompt_embeds.half())
    assert not reader.null_conditioning[0].any()
