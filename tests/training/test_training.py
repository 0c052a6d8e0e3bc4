"""Real training: Ray Train workers, accelerate, DeepSpeed ZeRO on gloo."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from encoded import write_base, write_encoded
from killer import check_killed_run
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from pipelines.dataset.errors import TrainingError
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.storage import Storage
from training.config import ExportConfig, TrainConfig
from training.data.index import load_index, load_texts
from training.data.loader import PairLoader, PairReader
from training.data.order import Plan, noise_seed
from training.export import export_model
from training.launch import TrainingResult, _trainer, train
from training.loop import draw_with
from training.losses import mapo_paper_loss
from training.model import Denoiser, load_base
from training.spec import TrainSpec, base_digest
from training.worker import make_plan

CONFIG = TrainConfig(
    num_workers=2,
    global_batch_size=8,
    micro_batch_size=2,
    max_steps=20,
    learning_rate=4e-3,
    precision="fp32",
    gradient_checkpointing=False,
    checkpoint_every=2,
    validate_every=10,
    ema={"decay": 0.9},
)


def make_spec(folder: Path, config: TrainConfig = CONFIG, sides: tuple[int, ...] = (8,)) -> TrainSpec:
    storage = Storage(str(folder / "storage"))
    snapshot = write_encoded(storage, folder, sides=sides)
    base = write_base(folder / "base")
    source = ModelSource(str(base))
    return TrainSpec(storage.url, "test", source, base_digest(source), 0, config, snapshot)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, tmp_path_factory) -> tuple[TrainSpec, TrainingResult]:
    spec = make_spec(tmp_path_factory.mktemp("undisturbed"))
    return spec, train(spec, lambda progress: None)


def expected_first_step(spec: TrainSpec) -> torch.Tensor:
    """Loss of the first global batch, computed in one process without Ray, accelerate or DeepSpeed."""
    base = load_base(spec.base)
    base.unet.eval()
    denoiser = Denoiser(base.unet, None, base, spec.config, device=torch.device("cpu"), dtype=torch.float32)
    index = load_index(spec.storage, spec.snapshot, "train")
    plan = make_plan(index, spec)
    reader = PairReader(spec.storage, load_texts(spec.storage, spec.snapshot))
    groups = [(slot, plan.group(0, slot)) for slot in range(plan.num_slots)]
    named = [(slot, [index.pair(g.bucket, int(e)) for e in g.elements]) for slot, g in groups]
    losses = []
    with torch.no_grad():
        for slot, batch in PairLoader(reader, named):
            generator = torch.Generator().manual_seed(noise_seed(spec.seed, 0, slot))
            noise, timesteps, batch = draw_with(generator, batch, reader, 1000, 0.0)
            errors = denoiser.errors(batch, noise, timesteps)
            losses.append(mapo_paper_loss(errors.chosen, errors.rejected, beta=8.0))
    return torch.cat(losses).mean()


def test_two_ranks_know_who_they_are_and_have_their_own_data(undisturbed) -> None:
    _, trained = undisturbed
    first, second = trained.workers
    assert [(w["rank"], w["world_size"], w["zero_stage"]) for w in trained.workers] == [(0, 2, 2), (1, 2, 2)]
    assert first["engine"] == second["engine"] == "DeepSpeedEngine"
    assert first["pid"] != second["pid"]
    assert first["num_pairs"] == second["num_pairs"] == 20 * 8 // 2
    assert first["digest"] != second["digest"]


def test_the_first_step_is_the_mean_over_the_planned_global_batch(undisturbed) -> None:
    spec, trained = undisturbed
    torch.testing.assert_close(
        torch.tensor(trained.history["steps"][0]["loss"]), expected_first_step(spec), rtol=1e-5, atol=1e-6
    )


def test_training_learns_the_preference(undisturbed) -> None:
    _, trained = undisturbed
    before, after = trained.history["validations"][0], trained.history["validations"][-1]
    assert (before["step"], after["step"]) == (0, 20)
    assert after["loss"] < before["loss"] - 0.1
    assert after["num_pairs"] == 6


def test_history_has_every_step_once(undisturbed) -> None:
    _, trained = undisturbed
    assert [s["step"] for s in trained.history["steps"]] == list(range(1, 21))
    assert trained.history["steps"][-1]["learning_rate"] < CONFIG.learning_rate / 100


def test_tensorboard_has_the_curves(undisturbed) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec, trained = undisturbed
    events = EventAccumulator(spec.storage.path(f"{spec.folder}/tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx([s["loss"] for s in trained.history["steps"]], rel=1e-5)


def test_a_worker_killed_at_any_moment_costs_time_and_nothing_else(undisturbed) -> None:
    """One kill; `make chaos` has more of them, in every stage."""
    spec = replace(undisturbed[0], run="killed")
    check_killed_run(spec, undisturbed, seed=0, num_kills=1)


@pytest.mark.slow
def test_bf16_with_buckets_dropout_and_the_released_loss_trains(ray_cluster, tmp_path) -> None:
    changes = {"method": "mapo", "precision": "bf16", "prompt_dropout": 0.5, "gradient_checkpointing": True}
    config = CONFIG.model_copy(update={**changes, "max_steps": 6, "checkpoint_every": 6})
    spec = make_spec(tmp_path, config, sides=(8, 12))
    trained = train(spec, lambda progress: None)
    assert len(load_index(spec.storage, spec.snapshot, "train").buckets) == 2
    assert trained.history["steps"][-1]["mse_chosen"] < trained.history["steps"][0]["mse_chosen"]
    assert all(w["zero_stage"] == 2 for w in trained.workers)


def test_a_bf16_step_of_no_length_exports_the_base_and_a_training_of_before_does_not(ray_cluster, tmp_path) -> None:
    """Two ranks of ZeRO-2: the masters are the base's float32 weights, and so is what is exported of them."""
    still = {"precision": "bf16", "max_steps": 1, "learning_rate": 1e-30, "weight_decay": 0.0, "ema": None}
    config = TrainConfig.model_validate(CONFIG.model_dump() | still | {"validate_every": 1, "checkpoint_every": 1})
    spec = make_spec(tmp_path, config)
    base = UNet2DConditionModel.from_pretrained(spec.base.folder() / "unet").state_dict()
    furthest = {}
    for each in (spec, spec.as_legacy()):
        trained = train(each, lambda progress: None)
        export_model(
            spec.storage, checkpoint=trained.checkpoint, source=spec.base, target=each.key, card="",
            config=ExportConfig(parts="unet"),
        )  # fmt: skip
        exported = UNet2DConditionModel.from_pretrained(spec.storage.path(each.key), subfolder="unet").state_dict()
        furthest[each.masters] = max(float((exported[name] - base[name]).abs().max()) for name in base)
    assert furthest["float32"] <= 1e-6
    assert furthest["rounded"] > 1e-4, "what it is compared with"


def test_more_workers_than_the_cluster_can_hold_is_an_error_not_a_wait(ray_cluster, tmp_path) -> None:
    config = CONFIG.model_copy(update={"num_workers": 64, "global_batch_size": 128})
    started = time.monotonic()
    with pytest.raises(TrainingError, match=r"num_workers is 64, but the cluster has 6 CPUs") as caught:
        train(make_spec(tmp_path, config), lambda progress: None)
    assert "hint:" in str(caught.value)
    assert time.monotonic() - started < 10


def test_without_a_dashboard_no_training_waits_for_its_answer(ray_cluster, tmp_path) -> None:
    """Ray Train's cleaner asks it, and holds up the end by 12 s; on a Ray with a dashboard it stays."""

    def callbacks() -> set[str]:
        trainer = _trainer(make_spec(Path(tempfile.mkdtemp(dir=tmp_path))), None, use_gpu=False)
        return {type(each).__name__ for each in trainer._create_default_callbacks()}

    url = _internal_kv_get(b"webui:url", namespace=b"dashboard")
    assert not url
    without = callbacks()
    try:
        _internal_kv_put(b"webui:url", b"127.0.0.1:8265", namespace=b"dashboard")
        assert callbacks() - without == {"PlacementGroupCleanerCallback"}
    finally:
        _internal_kv_put(b"webui:url", url or b"", namespace=b"dashboard")


def test_the_key_changes_with_what_shapes_the_weights_and_not_with_the_rest(tmp_path) -> None:
    spec = make_spec(tmp_path)
    same = replace(spec, config=CONFIG.model_copy(update={"max_failures": 9, "checkpoint_every": 7}))
    assert same.key == spec.key
    for change in ({"zero_stage": 1}, {"num_workers": 4}, {"compile": True}, {"gradient_checkpointing": True}):
        assert replace(spec, config=CONFIG.model_copy(update=change)).key == spec.key, "only rounding differs"
    for change in ({"learning_rate": 1e-6}, {"loss": {"beta": 9.0}}, {"max_steps": 41}, {"labels": "hard"}):
        assert replace(spec, config=CONFIG.model_copy(update=change)).key != spec.key
    assert replace(spec, seed=1).key != spec.key
    assert replace(spec, config=CONFIG.model_copy(update={"loss": {"beta": 8.0}})).key == spec.key, "8 is the default"


def test_the_plan_of_a_snapshot_does_not_depend_on_the_order_of_commits(tmp_path) -> None:
    spec = make_spec(tmp_path)
    index = load_index(spec.storage, spec.snapshot, "train")
    keys = [index.pair(0, i).pair_key for i in range(len(index))]
    assert keys == sorted(keys)
    assert isinstance(make_plan(index, spec), Plan)
