"""Suites: the prompts of the one that ships are pinned, and every departure from a protocol is said."""

import itertools
from collections import Counter

import pytest

from pipelines.dataset.errors import ConfigError
from pipelines.dataset.pair import prompt_id
from pipelines.suites.registry import load_suite, suite_names
from pipelines.suites.suite import Suite, SuitePrompt, numbered

STARTER_SHA256 = "f484e8518879686d446ab474ba0c9f97b2d4ce81bc038755074f21ac991930ae"
"""Of the prompts and kinds of `starter@1`. Another one is another suite: raise the version, keep this one."""


def suite(**fields: object) -> Suite:
    prompts = tuple(SuitePrompt.of(f"prompt {number}", "ab"[number % 2]) for number in range(10))
    return Suite(**{"name": "own", "version": 1, "prompts": prompts} | fields)  # type: ignore[arg-type]


def test_the_prompts_of_starter_never_change() -> None:
    starter = load_suite("starter@1")
    assert starter.sha256 == STARTER_SHA256
    assert starter == load_suite("starter")
    assert len({each.prompt for each in starter.prompts}) == 64
    assert Counter(each.tags for each in starter.prompts) == {
        (kind,): 16 for kind in ("people", "objects", "scenes", "style")
    }
    assert (starter.num_inference_steps, starter.guidance_scale, starter.resolution) == (30, 5.0, None)


def test_the_prompts_of_starter_are_read_whole_by_clip() -> None:
    lengths = [len(each.prompt.split()) for each in load_suite("starter").prompts]
    assert min(lengths) <= 4
    assert 15 < max(lengths) < 30
    assert all(each.prompt == each.prompt.strip() and each.prompt.isascii() for each in load_suite("starter").prompts)


def test_every_suite_has_a_version() -> None:
    assert all(name.partition("@")[2].isdigit() for name in suite_names())


def test_rows_that_a_benchmark_repeats_count_each() -> None:
    prompts = numbered([SuitePrompt.of("a", "x"), SuitePrompt.of("b", "x"), SuitePrompt.of("a", "y")])
    own = suite(prompts=prompts)
    assert [(each.sample_id, each.occurrence) for each in own.prompts] == [
        (prompt_id("a"), 0), (prompt_id("b"), 0), (prompt_id("a"), 1)
    ]  # fmt: skip
    assert {tag: len(members) for tag, members in own.tags.items()} == {"x": 2, "y": 1}


def test_what_judges_know_of_a_prompt_is_in_the_digest() -> None:
    told = [suite(prompts=(SuitePrompt.of("a", "x", metadata=each),)).sha256 for each in (None, "{}", '{"n":1}')]
    assert len(set(told)) == 3


@pytest.mark.parametrize("name", ["starter@2", "geneval-of-mine", ""])
def test_an_unknown_suite_is_refused_with_those_that_exist(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_suite(name)
    assert "held-out, prompts, starter@1" in str(refused.value.hint)


def test_a_prompt_has_the_id_that_pairs_know_it_by() -> None:
    assert SuitePrompt.of("a cat", "x").prompt_id == prompt_id("a cat")


def test_other_settings_are_said_and_the_suites_own_are_not() -> None:
    changed = suite(resolution=1024).changed(images_per_prompt=4, num_inference_steps=30, resolution=512)
    assert changed.deviations == ("4 images a prompt instead of 1", "512 pixels instead of 1024")
    assert (changed.images_per_prompt, changed.resolution, changed.guidance_scale) == (4, 512, 5.0)
    assert suite().changed(resolution=512).deviations == ()  # the suite leaves it to the run
    assert suite().changed() == suite()


def test_a_larger_limit_adds_prompts_and_drops_none() -> None:
    whole = suite()
    for seed in range(20):
        chosen = [set(whole.limited(limit, seed=seed).prompts) for limit in range(1, 10)]
        assert all(small < large for small, large in itertools.pairwise(chosen))
    assert len({whole.limited(3, seed=seed).prompts for seed in range(20)}) > 10
    few = whole.limited(3, seed=0)
    assert few.deviations == ("3 of 10 prompts",)
    assert few.prompts == tuple(each for each in whole.prompts if each in few.prompts)
    assert whole.limited(None, seed=0) == whole.limited(10, seed=0) == whole


def test_added_scorers_are_primary_where_a_suite_declares_none() -> None:
    assert suite(scorers=("x",)).with_scorers(["y", "x", "z"]).primary == ("y", "z")
    declared = suite(scorers=("x",), primary=("x",)).with_scorers(["y"])
    assert (declared.scorers, declared.primary) == (("x", "y"), ("x",))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompts": ()}, "no prompt"),
        ({"prompts": (SuitePrompt.of("a"), SuitePrompt.of("b"), SuitePrompt.of("a"))}, "1 of 3 prompts are repeated"),
        ({"images_per_prompt": 0}, "0 images a prompt"),
        ({"primary": ("pickscore",)}, "pickscore is not one of its scorers"),
        ({"prompts": (SuitePrompt.of("a"),), "macro": True}, "needs a tag"),
    ],
)
def test_a_suite_that_makes_no_sense_is_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        suite(**fields)
