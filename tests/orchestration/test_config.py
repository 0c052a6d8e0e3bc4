"""The configuration: every wrong key and value is one clear error, every default is visible."""

import json
from pathlib import Path

import pytest
import yaml

from orchestration.config import load_config, parse_config, resolved_json
from pipelines.dataset.errors import ConfigError

CONTRACT = """
name: photos
storage: runs/photos
seed: 0
ingest:
  sources:
    - {format: pickapic, path: data/*.parquet}
  max_shard_bytes: 268435456
  validation_ratio: 0.01
  max_drop_ratio: 0.05
encode:
  model: some/model
  vae: null
  resolution: 1024
  buckets: true
  dtype: float16
  batch_size: 8
  num_workers: 1
train:
  method: mapo_paper
  loss: {beta: 8}
  num_workers: 8
  global_batch_size: 2048
  micro_batch_size: 8
  max_steps: 2000
  learning_rate: 1.0e-7
  lr_schedule: cosine
  warmup_steps: 0
  precision: bf16
  zero_stage: 2
  offload: none
  gradient_checkpointing: true
  prompt_dropout: 0.0
  lora: null
  ema: null
  checkpoint_every: 500
  validate_every: 100
  max_failures: 3
"""

GOLDEN = Path(__file__).parent / "resolved_config.json"


def test_the_contract_parses_and_resolves_to_the_golden_configuration() -> None:
    """A changed default shows in review: `resolved_config.json` has to change with it."""
    assert json.loads(resolved_json(parse_config(CONTRACT))) == json.loads(GOLDEN.read_text())


def test_defaults_are_those_of_the_contract() -> None:
    minimal = "{name: n, storage: s, ingest: {sources: [{format: pickapic, path: p}]}, encode: {model: m}, train: {}}"
    given, default = parse_config(CONTRACT), parse_config(minimal)
    assert default.ingest == given.ingest.model_copy(update={"sources": default.ingest.sources})
    assert default.encode == given.encode.model_copy(update={"model": "m"})
    assert default.train.loss_parameters == given.train.loss_parameters
    assert default.train == given.train.model_copy(update={"num_workers": 1, "loss": {}})


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("train.num_worker=2", "unknown key `train.num_worker`", "did you mean `train.num_workers`?"),
        ("ingst.x=1", "unknown key `ingst`", "did you mean `ingest`?"),
        ("ingest.sources.0.pth=x", "unknown key `ingest.sources.0.pth`", "did you mean `ingest.sources.0.path`?"),
        ("encode.zzz=1", "unknown key `encode.zzz`", "known keys of encode: model, revision"),
        ("train.max_steps=0", "`train.max_steps`: Input should be greater than or equal to 1 (it is 0)", ""),
        ("train.max_steps=many", "`train.max_steps`: Input should be a valid integer", ""),
        ("train.global_batch_size=100", "not a multiple of micro_batch_size x num_workers = 8 x 8 = 64", "64, 128"),
        ("train.method=mappo", "train.method is 'mappo'", "did you mean `mapo`"),
        ("train.loss={gamma: 1}", "train.loss.gamma is not a parameter of method mapo_paper", "beta"),
        ("train.num_workers=4..2", "write a number of workers, such as 4, or a range, such as 2..8", ""),
        ("train.num_workers=2..512", "num_workers 2..512: a global batch of 2048 has 256 micro-batches", "lower"),
        ("train.lora={}", "`train.lora.rank`: Field required", ""),
        ("train.lora={rank: 4, alpha: 0}", "`train.lora.alpha`: Input should be greater than 0", ""),
        ("train.lora={rank: 4, target: [to_q]}", "unknown key `train.lora.target`", "`train.lora.targets`"),
        ("train.ema={decay: 1.0}", "`train.ema.decay`: Input should be less than 1", ""),
        ("train.precision=fp8", "`train.precision`: Input should be 'bf16', 'fp16' or 'fp32'", ""),
        ("train.offload=nvme", "offload nvme needs zero_stage 3 and offload_path", "offload: cpu"),
        ("train.loss={beta: 0}", "beta", ""),
        ("export.parts=vae", "`export.parts`: Input should be 'pipeline' or 'unet'", ""),
        ("export.push_to_hub=aligned", "`export.push_to_hub`: String should match pattern", ""),
        ("ingest.sources.0.format=parquet", "`ingest.sources.0.format`: Input should be 'pickapic'", ""),
        ("ingest.sources=[]", "`ingest.sources`", ""),
        ("encode.resolution=1001", "resolution must be a multiple of 8, not 1001", ""),
        ("encode.buckets=5", "write true, false (one square) or a list of [height, width]", ""),
        ("encode.buckets=[]", "write true, false (one square) or a list of [height, width]", ""),
        ("encode.buckets=[64, 64]", "a bucket must be [height, width] in whole pixels, not 64", ""),
        ("encode.buckets=[[64, 60]]", "multiples of 8 and at least 32 pixels, not [64, 60]", ""),
        ("encode.buckets=[[64, 64], [64, 64]]", "the list contains a bucket twice", ""),
        ("encode.num_workers=8..2", "write a number of workers, such as 4, or a range, such as 2..8", ""),
        ("encode.num_workers=0", "write a number of workers", ""),
        ("encode.vae_dtype=fp8", "Input should be 'float32', 'tf32', 'bfloat16' or 'float16'", ""),
        ("name=a/b", "'a/b' cannot be a folder's name", ""),
        ("name=..", "'..' cannot be a folder's name", ""),
        ("seed=-1", "`seed`", ""),
    ],
)
def test_a_wrong_setting_is_named_with_a_way_out(override: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(CONTRACT, [override], source="photos.yaml")
    assert str(caught.value).startswith("photos.yaml: ")
    assert message in str(caught.value)
    assert hint in (caught.value.hint or "")
    assert caught.value.exit_code == 2


def test_all_wrong_settings_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(CONTRACT, ["train.num_worker=2", "encode.batch_size=0"])
    assert "train.num_worker" in str(caught.value)
    assert "encode.batch_size" in str(caught.value)


@pytest.mark.parametrize(
    "override", ["train", "=3", "train.max_steps.x=3", "ingest.sources.7.path=x", "ingest.sources.a=x"]
)
def test_an_override_that_fits_nowhere_is_an_error(override: str) -> None:
    with pytest.raises(ConfigError, match="-o "):
        parse_config(CONTRACT, [override])


def test_overrides_are_typed_like_yaml_and_reach_into_lists() -> None:
    config = parse_config(CONTRACT, ["train.learning_rate=1.0e-5", "ingest.sources.0.path=other/*", "encode.vae=v"])
    assert config.train.learning_rate == 1e-5
    assert config.ingest.sources[0].path == "other/*"
    assert config.encode.vae == "v"


def test_a_learning_rate_of_null_is_one_that_is_left_out() -> None:
    left_out = parse_config(CONTRACT.replace("  learning_rate: 1.0e-7\n", ""), ["train.lora={rank: 4}"]).train
    null = parse_config(CONTRACT, ["train.learning_rate=null", "train.lora={rank: 4}"]).train
    assert null == left_out
    assert null.learning_rate == 5e-5
    assert "learning_rate" not in null.model_fields_set


@pytest.mark.parametrize("method", ["mapo_paper", "mapo", "sft", "dpo", "ipo", "simpo", "orpo"])
def test_every_method_has_defaults_of_its_own(method: str) -> None:
    train = parse_config(CONTRACT, [f"train.method={method}", "train.loss={}"]).train
    assert train is not None
    assert all(value > 0 for value in train.loss_parameters.values())


def test_adapters_averages_offload_and_a_range_of_workers_are_settings() -> None:
    overrides = ["train.num_workers=2..8", "train.precision=fp16", "train.lora={rank: 64}", "train.ema={}"]
    overrides += ["train.zero_stage=3", "train.offload=nvme", "train.offload_path=/nvme", "train.optimizer=adamw"]
    train = parse_config(CONTRACT, overrides).train
    assert train is not None
    assert (train.worker_range, train.precision) == ((2, 8), "fp16")
    assert train.lora is not None
    assert (train.lora.rank, train.lora.alpha, len(train.lora.targets)) == (64, None, 4)
    assert train.ema is not None
    assert train.ema.decay == 0.9999


def test_workers_are_a_number_or_a_range_and_buckets_a_list() -> None:
    encode = parse_config(CONTRACT, ["encode.num_workers=2..8", "encode.buckets=[[64, 64], [48, 80]]"]).encode
    assert encode is not None
    assert encode.worker_range == (2, 8)
    assert encode.buckets == ((64, 64), (48, 80))
    default = parse_config(CONTRACT).encode
    assert default is not None
    assert default.worker_range == (1, 1)


@pytest.mark.parametrize("text", ["", "[]", "name: [", "just words"])
def test_what_is_no_configuration_is_an_error(text: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=str(file)):
        load_config(file)


def test_a_resolved_configuration_is_a_configuration() -> None:
    config = parse_config(CONTRACT)
    assert parse_config(yaml.safe_dump(json.loads(resolved_json(config)))) == config


def test_every_shipped_configuration_parses() -> None:
    shipped = Path(__file__).parents[2] / "orchestration" / "demo" / "demo.yaml"
    config = parse_config(shipped.read_text())
    assert config.train.num_workers == 2
    assert config.train.zero_stage == 2
