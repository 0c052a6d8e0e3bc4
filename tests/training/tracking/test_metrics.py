"""Sums that combine exactly, whatever the batches; and where they are shown."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.dataset.storage import Storage
from training.losses import PairErrors
from training.run_progress import RunProgress, WorkerIdentity
from training.tracking.metrics import NUM_SUMS, History, MetricsWriter, means_of, pair_sums

T = 1000
VALUES = st.floats(0, 4, width=32)
PAIRS = st.lists(
    st.tuples(VALUES, VALUES, VALUES, VALUES, st.sampled_from([0.5, 0.7, 1.0]), st.integers(0, T - 1)),
    min_size=1,
    max_size=24,
)


def sums_of(pairs: list[tuple[float, ...]], *, has_reference: bool = True) -> torch.Tensor:
    columns = torch.tensor(pairs, dtype=torch.float32).reshape(len(pairs), -1).T
    chosen, rejected, ref_chosen, ref_rejected, preference, timesteps = columns
    errors = PairErrors(chosen, rejected, *((ref_chosen, ref_rejected) if has_reference else ()))
    return pair_sums(chosen + 1, errors, preference, timesteps.long(), T)


def pair(chosen: float = 0.1, rejected: float = 0.2, preference: float = 1.0, timestep: int = 0) -> tuple[float, ...]:
    return chosen, rejected, 0.0, 0.0, preference, timestep


@given(pairs=PAIRS, data=st.data())
@settings(max_examples=80, deadline=None)
def test_micro_batches_and_ranks_of_any_size_give_the_metrics_of_the_whole_batch(pairs, data) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(pairs)), max_size=4)))
    parts = [pairs[a:b] for a, b in zip([0, *cuts], [*cuts, len(pairs)], strict=True) if a < b]
    whole, together = means_of(sums_of(pairs)), means_of(torch.stack([sums_of(part) for part in parts]).sum(dim=0))
    assert whole.keys() == together.keys()
    assert together == pytest.approx(whole, rel=1e-12, abs=1e-12)


@given(pairs=PAIRS)
@settings(max_examples=40, deadline=None)
def test_a_weight_is_that_many_repeats(pairs) -> None:
    twice_the_first = means_of(2 * sums_of(pairs[:1]) + sums_of(pairs))
    assert twice_the_first == pytest.approx(means_of(sums_of(pairs[:1] * 2 + pairs)), rel=1e-12, abs=1e-12)
    assert means_of(0 * sums_of(pairs[:1]) + sums_of(pairs)) == means_of(sums_of(pairs))


def test_the_means_are_those_of_the_definition() -> None:
    means = means_of(sums_of([pair(0.5, 0.25), pair(0.25, 1.0), pair(0.0, 0.5)], has_reference=False))
    assert means == {
        "loss": 1.25,
        "mse_chosen": 0.25,
        "mse_rejected": pytest.approx(1.75 / 3),
        "margin": pytest.approx(1.0 / 3),
        "implicit_accuracy": pytest.approx(2 / 3),
        "implicit_accuracy_q1": pytest.approx(2 / 3),
        "num_pairs": 3.0,
    }


def test_a_tie_and_equal_errors_are_half_right() -> None:
    right, tie, equal = pair(0.1, 0.2), pair(0.1, 0.2, preference=0.5), pair(0.2, 0.2)
    assert means_of(sums_of([right]))["implicit_accuracy"] == 1.0
    assert means_of(sums_of([tie]))["implicit_accuracy"] == 0.5
    assert means_of(sums_of([equal]))["implicit_accuracy"] == 0.5
    assert means_of(sums_of([right, tie]))["num_ties"] == 1.0
    assert "num_ties" not in means_of(sums_of([right]))


def test_quarters_split_the_timesteps_and_are_absent_where_nothing_fell() -> None:
    means = means_of(
        sums_of([pair(timestep=249), pair(0.3, timestep=250), pair(timestep=999), pair(0.3, timestep=999)])
    )
    quarters = {name: value for name, value in means.items() if name.startswith("implicit_accuracy_")}
    assert quarters == {"implicit_accuracy_q1": 1.0, "implicit_accuracy_q2": 0.0, "implicit_accuracy_q4": 0.5}


def test_the_reward_is_the_gain_over_the_reference() -> None:
    better_than_reference_on_chosen = (0.3, 0.2, 0.5, 0.2, 1.0, 0)  # gains 0.2 and 0: right, though 0.3 > 0.2
    worse = (0.1, 0.2, 0.1, 0.5, 1.0, 0)  # gains 0 and 0.3: wrong, though 0.1 < 0.2
    means = means_of(sums_of([better_than_reference_on_chosen, worse, worse]))
    assert (means["implicit_accuracy"], means["reward_accuracy"]) == pytest.approx((2 / 3, 1 / 3))
    unchanged = (0.3, 0.2, 0.3, 0.2, 1.0, 0)
    assert means_of(sums_of([unchanged]))["reward_accuracy"] == 0.5
    assert "reward_accuracy" not in means_of(sums_of([worse], has_reference=False))


def test_sums_carry_no_gradient_and_stay_where_the_errors_are() -> None:
    chosen = torch.tensor([0.1, 0.2], requires_grad=True)
    sums = pair_sums(chosen * 2, PairErrors(chosen, chosen.detach() + 1), torch.ones(2), torch.tensor([0, 999]), T)
    assert not sums.requires_grad
    assert (sums.dtype, sums.shape) == (torch.float64, (NUM_SUMS,))
    meta = torch.empty(2, device="meta")
    times = torch.empty(2, device="meta", dtype=torch.int64)
    # The meta device has no values to read: one `.item()` here would be a wait for the GPU there.
    assert pair_sums(meta, PairErrors(meta, meta), meta, times, T).device.type == "meta"


def test_a_loss_that_is_no_number_stays_none() -> None:
    means = means_of(sums_of([pair(math.nan, 0.1), pair()]))
    assert math.isnan(means["loss"])
    assert math.isnan(means["margin"])
    assert means["num_pairs"] == 2


def test_no_pair_has_no_metrics() -> None:
    assert means_of(torch.zeros(NUM_SUMS, dtype=torch.float64)) == {"num_pairs": 0.0}


class Recorder:
    """A tracker that keeps what it is given."""

    warning = None

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []
        self.closed: list[bool] = []
        self.images: list[tuple[str, int]] = []
        self.flushes = 0

    def log(self, metrics, step) -> None:
        self.logged.append((dict(metrics), step))

    def image(self, name, image, step) -> None:
        self.images.append((name, step))

    def flush(self) -> None:
        self.flushes += 1

    def close(self, *, failed) -> None:
        self.closed.append(failed)


WORKER = WorkerIdentity(0, 1, 4711, "10.0.0.1", "cpu", "gloo", "DeepSpeedEngine", 2)
PROGRESS = RunProgress("c0ffee", 1, 4, 2, 1.5, {"model": 2.0}, [WORKER], ["a note"], {"loss": 0.5})


def test_the_writer_feeds_every_tracker_and_the_progress_file(tmp_path) -> None:
    storage, trackers = Storage(str(tmp_path)), [Recorder(), Recorder()]
    trackers[1].warning = "tracker wandb disabled"
    with MetricsWriter(storage, "runs/photos", trackers) as out:
        out.step({"step": 1, "loss": 0.5, "num_pairs": 8.0}, PROGRESS)
        out.validation({"step": 1, "loss": 0.25, "num_pairs": 3.0})
        out.image("samples/grid", tmp_path / "grid.png", 1)
        out.flush()
        assert out.warnings == ["tracker wandb disabled"]
    written = storage.read("runs/photos/progress.json")
    assert json.loads(written) == {
        "key": "c0ffee", "step": 1, "max_steps": 4, "starts": 2, "started_at": 1.5, "start_up_s": {"model": 2.0},
        "workers": [asdict(WORKER)], "notes": ["a note"], "last": {"loss": 0.5},
    }  # fmt: skip
    assert RunProgress.parse(written) == PROGRESS
    for other in (b"{}", b"[]", b'{"workers": [], "more": 1}', written.replace(b"pid", b"id")):
        with pytest.raises(ValueError):
            RunProgress.parse(other)
    for tracker in trackers:
        assert tracker.logged == [({"train/loss": 0.5}, 1), ({"validation/loss": 0.25}, 1)]
        assert (tracker.images, tracker.flushes, tracker.closed) == ([("samples/grid", 1)], 1, [False])


def test_trackers_are_told_that_a_run_failed(tmp_path) -> None:
    tracker = Recorder()
    with pytest.raises(RuntimeError, match="gone"), MetricsWriter(Storage(str(tmp_path)), "runs/photos", [tracker]):
        raise RuntimeError("gone")
    assert tracker.closed == [True]


def test_history_survives_its_checkpoint() -> None:
    history = History([{"step": 1, "loss": 0.5}], [{"step": 0, "loss": 0.7, "implicit_accuracy": 0.5}])
    again = History.from_dict(json.loads(json.dumps(history.to_dict())))
    assert again == history
    assert again.last() == {"step": 1, "loss": 0.5, "validation_loss": 0.7, "validation_implicit_accuracy": 0.5}
