"""The gallery: it shows where models differ most and where judges disagree, the same for the same values, and no more
images than a page can hold."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.suites.cells import VALUES_SCHEMA
from pipelines.suites.gallery import DISAGREE, SPECIMEN, GalleryEntry, choose_gallery, differs_most, image_name
from pipelines.suites.results import Judge
from pipelines.suites.suite import Suite, SuitePrompt

NUM_PROMPTS = 40


def suite_of(images: int = 1, **fields: Any) -> Suite:
    prompts = tuple(SuitePrompt.of(f"prompt {number}") for number in range(NUM_PROMPTS))
    given = {"scorers": ("pick", "hps"), "primary": ("pick", "hps"), "images_per_prompt": images} | fields
    return Suite("own", 1, prompts, **given)


def table(suite: Suite, values: Mapping[tuple[str, str], Any]) -> pa.Table:
    """Rows of [prompt, image] values by model and scorer."""
    rows = [
        (model, scorer, prompt.prompt_id, index, float(np.reshape(found, (NUM_PROMPTS, -1))[number, index]), None)
        for (model, scorer), found in values.items()
        for number, prompt in enumerate(suite.prompts)
        for index in range(suite.images_per_prompt)
    ]
    columns = [list(each) for each in zip(*rows, strict=True)]
    columns[4] = [None if math.isnan(each) else each for each in columns[4]]
    return pa.table(dict(zip(VALUES_SCHEMA.names, columns, strict=True)), schema=VALUES_SCHEMA)


@pytest.fixture
def values() -> dict[tuple[str, str], Any]:
    rng = np.random.default_rng(5)
    return {
        (model, scorer): rng.normal(20, 0.01, NUM_PROMPTS)
        for model in ("aligned", "base")
        for scorer in ("pick", "hps")
    }


def because(entries: tuple[GalleryEntry, ...], why: str) -> list[str]:
    return [entry.prompt for entry in entries if why in entry.why]


def test_prompts_where_models_differ_most_come_first(values: dict[tuple[str, str], Any]) -> None:
    values["aligned", "pick"][[3, 7]] += (5, -9)
    values["aligned", "hps"][11] += 4
    found = choose_gallery(table(suite_of(), values), suite_of(), against="base", num_each=2)
    assert because(found, differs_most("pick")) == ["prompt 7", "prompt 3"]
    assert because(found, differs_most("hps"))[0] == "prompt 11"
    assert len(because(found, SPECIMEN)) == 12
    assert list(found[0].images) == ["base", "aligned"]


def test_judges_disagree_where_one_gains_and_another_loses(values: dict[tuple[str, str], Any]) -> None:
    values["aligned", "pick"][[3, 7, 9]] += (5, -9, 5)
    values["aligned", "hps"][[3, 7, 9]] += (-3, -3, 3)
    suite = suite_of()
    found = choose_gallery(table(suite, values), suite, against="base", num_each=1)
    assert because(found, DISAGREE) == ["prompt 3"]
    judges = {"hps": Judge(higher_is_better=False)}
    turned = choose_gallery(table(suite, values), suite, against="base", judges=judges, num_each=1)
    assert because(turned, DISAGREE) == ["prompt 7"]


def test_the_image_of_a_prompt_that_differs_most_is_the_one_shown(values: dict[tuple[str, str], Any]) -> None:
    suite = suite_of(images=3, primary=("pick",))
    wide = {place: np.repeat(each[:, None], 3, axis=1) for place, each in values.items()}
    wide["aligned", "pick"][5] += (2, 8, 3)
    found = choose_gallery(table(suite, wide), suite, against="base", num_each=2, num_plain=0)
    assert (found[0].prompt, found[0].index) == ("prompt 5", 1)
    assert len({entry.prompt for entry in found}) == len(found)


def test_a_failed_score_is_no_difference_and_is_shown_as_none(values: dict[tuple[str, str], Any]) -> None:
    values["aligned", "pick"][4] += 100
    values["base", "pick"][4] = math.nan
    suite = suite_of()
    found = choose_gallery(table(suite, values), suite, against="base", num_plain=NUM_PROMPTS)
    entry = next(entry for entry in found if entry.prompt == "prompt 4")
    assert differs_most("pick") not in entry.why
    assert entry.images["base"].scores["pick"] is None
    assert entry.images["base"].scores["hps"] == values["base", "hps"][4]


def test_the_same_values_give_the_same_gallery_in_any_order(values: dict[tuple[str, str], Any]) -> None:
    suite = suite_of()
    rows = table(suite, values)
    shuffled = rows.take(np.random.default_rng(0).permutation(rows.num_rows))
    assert choose_gallery(rows, suite, against="base") == choose_gallery(shuffled, suite, against="base")


def test_specimens_are_spread_over_the_suite(values: dict[tuple[str, str], Any]) -> None:
    suite = suite_of(primary=())
    found = choose_gallery(table(suite, values), suite, against="base", num_each=0, num_plain=4)
    assert [entry.prompt for entry in found] == ["prompt 0", "prompt 10", "prompt 20", "prompt 30"]
    assert because(choose_gallery(table(suite, values), suite, against="base"), DISAGREE) == []


def test_checkpoints_are_not_shown_beside_named_models(values: dict[tuple[str, str], Any]) -> None:
    suite = suite_of()
    steps = {(f"step-{step}", "pick"): values["base", "pick"] for step in (20, 40)}
    (first, *_) = choose_gallery(table(suite, values | steps), suite, against="base")
    assert list(first.images) == ["base", "aligned"]
    alone = {place: each for place, each in values.items() if place[0] == "base"}
    (first, *_) = choose_gallery(table(suite, alone | steps), suite, against="base")
    assert set(first.images) == {"base", "step-20", "step-40"}


def test_many_models_get_fewer_prompts(values: dict[tuple[str, str], Any]) -> None:
    suite = suite_of()
    many = values | {(f"model{number}", "pick"): values["base", "pick"] for number in range(10)}
    found = choose_gallery(table(suite, many), suite, against="base", max_images=60)
    assert len(found) == 5
    assert sum(len(entry.images) for entry in found) == 60


def test_rows_of_other_suites_are_not_shown(values: dict[tuple[str, str], Any]) -> None:
    suite = suite_of()
    own = table(suite, values)
    foreign = own.set_column(2, "prompt_id", pa.array(["f" * 32] * own.num_rows))
    both = [
        each.append_column("suite", pa.array([name] * own.num_rows)) for each, name in ((own, "own"), (foreign, "x"))
    ]
    assert choose_gallery(pa.concat_tables(both), suite, against="base") == choose_gallery(own, suite, against="base")


def test_an_image_has_a_name_that_is_safe_as_a_file_and_its_own() -> None:
    names = {
        image_name(suite, model, prompt, index)
        for suite in ("held-out", "own") for model in ("base", "step-20") for prompt in ("a" * 32, "b" * 32)
        for index in (0, 1)
    }  # fmt: skip
    assert len(names) == 16
    assert all("/" not in name and name.endswith(".png") for name in names)
