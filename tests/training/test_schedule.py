"""Learning rates and moving averages as functions of the step, against torch, diffusers and a simulation."""

from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel

from training.config import EmaConfig, TrainConfig
from training.schedule import average_share, decay_at, learning_rate_at


def config(**settings: Any) -> TrainConfig:
    return TrainConfig.model_validate(settings)


def test_the_decay_is_that_of_diffusers_at_every_step() -> None:
    for decay in (0.9999, 0.999, 0.5):
        theirs = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=decay)
        for step in [*range(30), 500, 1999, 89_990, 200_000]:  # diffusers counts from 1
            assert decay_at(step, EmaConfig(decay=decay)) == pytest.approx(theirs.get_decay(step + 1), abs=1e-12)


def test_at_its_defaults_the_average_holds_nearly_all_of_a_steady_training_and_without_warm_up_a_tenth() -> None:
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    theirs = EMAModel([weight], decay=0.9999)
    for step in range(2000):
        weight.data.fill_(step + 1.0)
        theirs.step([weight])
    simulated = float(theirs.shadow_params[0]) / 2000
    found = average_share(config(ema={}, lr_schedule="constant"))
    assert found == pytest.approx(simulated, abs=1e-3)
    assert found >= 0.89
    before = average_share(config(ema={"warmup": False}, lr_schedule="constant"))
    assert before == pytest.approx(1 - (1 - 0.9999**2000) / (2000 * 1e-4) * 0.9999, abs=1e-3)
    assert before < 0.1


def test_a_falling_rate_leaves_less_behind_and_no_average_nothing() -> None:
    assert average_share(config(ema={})) > average_share(config(ema={}, lr_schedule="constant"))
    assert average_share(config()) == 1
    assert average_share(config(ema={}), num_steps=0) == 1
    assert average_share(config(ema={}), num_steps=1) == 1, "the first step is taken as it is"


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_rises_in_the_warm_up_and_follows_the_published_schedules(schedule: str) -> None:
    """`transformers` has the schedules that the released scripts call; its warm-up starts at 0, ours one step later."""
    from transformers import get_scheduler

    ours = config(lr_schedule=schedule, learning_rate=2e-5, warmup_steps=10, max_steps=50)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs: Any = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=50)
    rates = []
    for _ in range(51):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert [learning_rate_at(step, ours) for step in range(10)] == pytest.approx(rates[1:11])
    assert [learning_rate_at(step, ours) for step in range(10, 50)] == pytest.approx(rates[10:50])
