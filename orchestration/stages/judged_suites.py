"""The suites of an evaluation: benchmarks of the registry, held-out prompts of the data set, and a file of prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipelines.dataset.pair import VALIDATION
from pipelines.dataset.storage import Storage
from pipelines.samples.prompts import read_prompts
from pipelines.suites.registry import HELD_OUT, PROMPTS, expanded, load_suites
from pipelines.suites.suite import Suite, SuitePrompt

if TYPE_CHECKING:
    from orchestration.config import RunConfig
    from orchestration.stages.held_out import HeldOutPairs


NONE_HELD_OUT = "none are held out"


def names_of_suites(config: RunConfig) -> list[str]:
    """Return the names of the suites, with the members of a group in its place."""
    return expanded(config.evaluate.suite_names)


def judged_suites(config: RunConfig, held_out: HeldOutPairs) -> list[Suite]:
    """Return the suites as this run draws them, with the settings of `evaluate`.

    Raises:
        ConfigError: A suite is unknown, or the file of prompts cannot be read.
        ModelError: The prompts of a suite were not fetched.
        SnapshotError: `held-out` is wanted, and there are no pairs.
    """
    names, others = names_of_suites(config), iter(suites_without_pairs(config))
    num_samples = config.evaluate.num_samples
    suites = [held_out_suite(held_out, num_samples) if name == HELD_OUT else next(others) for name in names]
    return [_as_drawn(suite, config) for suite in suites]


def _as_drawn(suite: Suite, config: RunConfig) -> Suite:
    """Return a suite with the settings of `evaluate`, which are a departure from a benchmark, not from own prompts."""
    evaluate = config.evaluate
    changed = suite.changed(
        images_per_prompt=evaluate.images_per_prompt,
        num_inference_steps=evaluate.num_inference_steps,
        guidance_scale=evaluate.guidance_scale,
        resolution=evaluate.resolution,
    )
    drawn = replace(changed, deviations=()) if suite.name in (HELD_OUT, PROMPTS) else changed
    return drawn.limited(evaluate.limit_prompts, seed=config.seed)


def held_out_suite(held_out: HeldOutPairs, num_samples: int) -> Suite:
    """Return the first `num_samples` held-out prompts by id, with as many images of each as fit."""
    rows = held_out.rows
    prompts = dict(zip(rows["prompt_id"].to_pylist(), rows["prompt"].to_pylist(), strict=True))
    chosen = sorted(prompts)[:num_samples]
    whose = "held-out prompts" if held_out.split == VALIDATION else f"training prompts, because {NONE_HELD_OUT},"
    return Suite(
        HELD_OUT,
        1,
        tuple(SuitePrompt(each, prompts[each]) for each in chosen),
        images_per_prompt=max(1, num_samples // len(chosen)),
        protocol=f"{len(chosen)} of {len(prompts)} {whose} of the run's own data set, the first by prompt_id",
        source="the run's data set",
    )


def _own_prompts(config: RunConfig) -> Suite:
    file = config.evaluate.prompts
    assert file is not None  # the configuration checks it
    prompts = tuple(SuitePrompt(each.prompt_id, each.prompt, each.tags) for each in read_prompts(file, config.seed))
    return Suite(PROMPTS, 1, prompts, protocol=f"{len(prompts)} prompts of {file.path}", source=file.path)


def suites_without_pairs(config: RunConfig) -> list[Suite]:
    """Return the suites that need no data set, so that a run can check them before it has one.

    One command asks for them several times; their files are read again only after they have changed.

    Raises:
        ConfigError: A suite is unknown, or the file of prompts cannot be read.
        ModelError: The prompts of a suite were not fetched.
    """
    names = [name for name in names_of_suites(config) if name != HELD_OUT]
    loaded = iter(load_suites([name for name in names if name != PROMPTS], Storage(config.storage)))
    return [_own_prompts(config) if name == PROMPTS else next(loaded) for name in names]


def planned_suites(config: RunConfig) -> list[Suite]:
    """Return the suites that need no data set, as this run draws them.

    Raises:
        ConfigError: A suite is unknown, or the file of prompts cannot be read.
        ModelError: The prompts of a suite were not fetched.
    """
    return [_as_drawn(suite, config) for suite in suites_without_pairs(config)]


def max_samples(config: RunConfig) -> int:
    """Bound the samples of one model from above, without a look at the data set."""
    evaluate = config.evaluate
    held_out = evaluate.num_samples * (evaluate.images_per_prompt or 1) if HELD_OUT in evaluate.suite_names else 0
    return held_out + sum(len(suite.prompts) * suite.images_per_prompt for suite in planned_suites(config))


def suites_identity(config: RunConfig) -> list[Any]:
    """Return plain data that changes whenever a prompt of a suite does; that of `held-out` follows from the pairs."""
    return [names_of_suites(config), [[each.label, each.sha256] for each in suites_without_pairs(config)]]
