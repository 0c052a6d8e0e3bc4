"""Mirrored images and dropped prompts in training: coins that follow from seed, step and slot, and what they change."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded import write_base, write_encoded

from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.storage import Storage
from training.config import TrainConfig
from training.data.index import PairIndex, load_index, load_texts
from training.data.loader import PairLoader, PairReader
from training.data.order import Plan, flips_of, noise_seed
from training.launch import train
from training.loop import draw_with
from training.losses import mapo_paper_loss
from training.model import Denoiser, load_base
from training.spec import Snapshot, TrainSpec, base_digest
from training.worker import make_plan, turns

NUM_PAIRS = 4096
CONFIG = TrainConfig(
    global_batch_size=8, micro_batch_size=2, max_steps=1, learning_rate=1e-3, precision="fp32",
    gradient_checkpointing=False, flips="image", null_prompt="empty", prompt_dropout=0.5, max_validation_pairs=2,
)  # fmt: skip


@dataclass
class Rank:
    """What `turns` asks of an engine."""

    rank: int
    world_size: int
    config: TrainConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, Snapshot]:
    """Pairs with mirrored images, whose latents differ by 3, and the embedding of ""."""
    folder = tmp_path_factory.mktemp("flips")
    storage = Storage(str(folder / "storage"))
    return storage, write_encoded(storage, folder, flips=True, include_empty_prompt=True)


@pytest.fixture(scope="module")
def index(data: tuple[Storage, Snapshot]) -> PairIndex:
    return load_index(*data, "train")


def test_coins_are_fair_and_of_the_kind_that_is_asked_for() -> None:
    none, pair, image = (np.array(flips_of(3, 5, 7, NUM_PAIRS, kind)) for kind in ("none", "pair", "image"))
    bound = 5 * 0.5 / NUM_PAIRS**0.5  # five standard deviations
    assert not none.any()
    assert np.array_equal(pair[:, 0], pair[:, 1])
    for coins in (pair[:, 0], image[:, 0], image[:, 1], image[:, 0] ^ image[:, 1], image[1:, 0] ^ image[:-1, 1]):
        assert abs(coins.mean() - 0.5) < bound


def test_every_seed_step_and_slot_has_coins_of_its_own() -> None:
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0, 11, 0), (0, 1, 10)]
    coins = [np.array(flips_of(*place, NUM_PAIRS, "pair"))[:, 0] for place in places]
    for number, one in enumerate(coins):
        for other in coins[:number]:
            assert abs((one ^ other).mean() - 0.5) < 5 * 0.5 / NUM_PAIRS**0.5
    slots = np.array([flips_of(0, step, slot, 1, "pair")[0][0] for step in range(64) for slot in range(64)])
    assert abs(slots.mean() - 0.5) < 5 * 0.5 / 64
    assert flips_of(0, 3, 1, 8, "image") == flips_of(0, np.int64(3), 1, 8, "image")


@pytest.mark.parametrize("kind", ["pair", "image"])
def test_coins_are_the_same_for_any_workers_and_after_any_resume(kind: str, index: PairIndex) -> None:
    config = CONFIG.model_copy(update={"flips": kind, "max_steps": 3})
    plan = Plan(index.bucket_sizes, 2, 8, 0)

    def drawn(world_size: int, first_step: int = 0) -> dict[tuple[int, int], list[tuple[str, tuple[bool, bool]]]]:
        found = {}
        for rank in range(world_size):
            for (step, slot, weight), records in turns(
                plan, index, Rank(rank, world_size, config), first_step=first_step
            ):
                if weight:
                    found[step, slot] = [(record.pair_key, record.flipped) for record in records]
        return found

    alone = drawn(1)
    assert len(alone) == 3 * 4
    for world_size in (2, 3, 4):
        assert drawn(world_size) == alone
    assert drawn(3, first_step=2) == {place: pairs for place, pairs in alone.items() if place[0] == 2}
    sides = {flipped for pairs in alone.values() for _, flipped in pairs}
    assert len(sides) == (2 if kind == "pair" else 4)


def test_held_out_pairs_and_trainings_without_flips_read_images_as_they_are(
    data: tuple[Storage, Snapshot], index: PairIndex, tmp_path: Path
) -> None:
    plain = Storage(str(tmp_path / "plain"))
    without = load_index(plain, write_encoded(plain, tmp_path), "train")
    plan = Plan(index.bucket_sizes, 2, 8, 0)
    rank = Rank(0, 1, CONFIG.model_copy(update={"flips": "none"}))
    ours, theirs = (
        PairLoader(PairReader(storage, load_texts(storage, snapshot)), turns(plan, each, rank, first_step=0))
        for storage, snapshot, each in ((*data, index), (plain, Snapshot(**vars(data[1])), without))
    )
    for (_, one), (_, other) in zip(ours, theirs, strict=True):
        assert torch.equal(one.chosen_BCHW, other.chosen_BCHW)
        assert torch.equal(one.rejected_BCHW, other.rejected_BCHW)
        assert torch.equal(one.chosen_time_ids_B6, other.chosen_time_ids_B6)
    held_out = load_index(*data, "validation")
    assert all(held_out.pair(0, number).flipped == (False, False) for number in range(held_out.bucket_sizes[0]))


def test_a_dropped_prompt_becomes_what_is_asked_for_and_nothing_else_changes(
    data: tuple[Storage, Snapshot], index: PairIndex
) -> None:
    storage, snapshot = data
    reader = PairReader(storage, load_texts(storage, snapshot, include_empty_prompt=True))
    batch = reader.read([index.pair(0, number) for number in range(8)])
    draws = {}
    for kind in ("auto", "zeros", "empty"):
        draws[kind] = draw_with(torch.Generator().manual_seed(1), batch, reader, 1000, 0.5, kind)
    noise, timesteps, auto = draw_with(torch.Generator().manual_seed(1), batch, reader, 1000, 0.5)
    dropped = torch.tensor([not bool(row.any()) for row in auto.prompt_embeds_BSD])
    assert 0 < dropped.sum() < 8
    expected = {"auto": reader.null_conditioning, "empty": reader.empty_conditioning}
    expected["zeros"] = tuple(torch.zeros_like(each) for each in expected["empty"])
    assert expected["empty"][0].any()
    for kind, (its_noise, its_timesteps, found) in draws.items():
        assert torch.equal(its_noise, noise)
        assert torch.equal(its_timesteps, timesteps)
        for row in range(8):
            embeds, pooled = found.prompt_embeds_BSD[row], found.pooled_BP[row]
            of_batch = (batch.prompt_embeds_BSD[row], batch.pooled_BP[row])
            wanted = expected[kind] if dropped[row] else of_batch
            assert torch.equal(embeds, wanted[0])
            assert torch.equal(pooled, wanted[1])
            assert embeds.dtype == of_batch[0].dtype


def expected_first_step(spec: TrainSpec) -> float:
    """Loss of the first global batch, from the members that the coins name; without Ray, accelerate or DeepSpeed."""
    base = load_base(spec.base)
    base.unet.eval()
    denoiser = Denoiser(base.unet, None, base, spec.config, device=torch.device("cpu"), dtype=torch.float32)
    index = load_index(spec.storage, spec.snapshot, "train")
    plan, losses = make_plan(index, spec), []
    reader = PairReader(spec.storage, load_texts(spec.storage, spec.snapshot, include_empty_prompt=True))
    for slot in range(plan.num_slots):
        group = plan.group(0, slot)
        records = [index.pair(group.bucket, int(element)) for element in group.elements]
        batch = reader.read(records)
        chosen, rejected = batch.chosen_BCHW.clone(), batch.rejected_BCHW.clone()
        times = batch.chosen_time_ids_B6.clone(), batch.rejected_time_ids_B6.clone()
        for row, coins in enumerate(flips_of(spec.seed, 0, slot, len(records), spec.config.flips)):
            for latents, ids, side in zip(
                (chosen, rejected), times, (records[row].chosen, 1 - records[row].chosen), strict=True
            ):
                if coins[side]:
                    latents[row], ids[row, 3] = latents[row].flip(-1) + 3, 1
        batch = replace(
            batch,
            chosen_BCHW=chosen,
            rejected_BCHW=rejected,
            chosen_time_ids_B6=times[0],
            rejected_time_ids_B6=times[1],
        )
        generator = torch.Generator().manual_seed(noise_seed(spec.seed, 0, slot))
        noise, timesteps, batch = draw_with(
            generator, batch, reader, 1000, spec.config.prompt_dropout, spec.config.null_prompt
        )
        with torch.no_grad():
            errors = denoiser.errors(batch, noise, timesteps)
        losses.append(mapo_paper_loss(errors.chosen, errors.rejected, beta=8.0))
    return float(torch.cat(losses).mean())


def test_a_real_training_is_on_the_mirrored_images_and_the_empty_prompt(
    ray_cluster: None, data: tuple[Storage, Snapshot], tmp_path: Path
) -> None:
    storage, snapshot = data
    source = ModelSource(str(write_base(tmp_path / "base")))
    spec = TrainSpec(storage.url, "flips", source, base_digest(source), 0, CONFIG, snapshot)
    trained = train(spec, lambda progress: None)
    first = trained.history["steps"][0]["loss"]
    assert first == pytest.approx(expected_first_step(spec), rel=1e-5)
    others = {"flips": "none"}, {"flips": "pair"}, {"null_prompt": "auto"}, {"prompt_dropout": 0.0}
    for other in others:
        changed = replace(spec, config=CONFIG.model_copy(update=other))
        assert changed.key != spec.key
        assert first != pytest.approx(expected_first_step(changed), rel=1e-4)
