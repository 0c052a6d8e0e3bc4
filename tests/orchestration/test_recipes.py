"""The ready configurations: each has the settings that were published for it, and each trains."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from factories import new_sd15_pipeline, photo_pairs, write_parquet

import orchestration
from orchestration.config import RunConfig, parse_config
from orchestration.driver.runner import plan_run, run_stages
from orchestration.run.journal import Journal
from orchestration.stages.training_notes import learning_rate, training_notes, training_settings
from pipelines.dataset.storage import Storage
from training.config import TrainConfig
from training.methods import METHODS, default_rate

RECIPES = Path(orchestration.__file__).parent / "recipes" / "methods"
FILES = sorted(RECIPES.glob("*.yaml"))
PAGES = Path(__file__).parents[2] / "docs" / "guides" / "recipes"

MAPO, DIFFUSION_DPO = "mapo-t2i/mapo 374b3d3", "SalesforceAIResearch/DiffusionDPO 5233e75"
DIFFUSERS, DCO = "huggingface/diffusers 58eb52c", "kyungmnlee/dco 164ae17"
ORPO_README = "huggingface/diffusers 1d9a6a8"
MAPO_PAPER, DPO_PAPER = "arXiv 2406.06424v2", "arXiv 2311.12908"
NONE = "none published"
WITH_RECIPE = {method.recipe for method in METHODS.values() if method.recipe is not None}

SOURCE = re.compile(
    rf"(?:[\w-]+/[\w-]+ [0-9a-f]{{7}} [\w./]+:\d+(?:-\d+)?"  # a repository at a commit, a file, a line
    rf"|arXiv \d{{4}}\.\d{{5}}(?:v\d)? .+"  # a paper, a section or a table
    rf"|{NONE}(?:; .+)?)"
)


@dataclass(frozen=True)
class Published:
    """One value, and where it was published."""

    value: Any
    source: str


def of_launcher(
    name: str, *, beta: Published | None, rate: Published, warmup: int, null_line: str
) -> dict[str, Published]:
    """The settings that both launchers of Diffusion-DPO share, with the lines of one of them."""
    lines = {"sdxl.sh": (15, 17, 16), "sd15.sh": (12, 14, 13)}[name]
    accumulation, schedule, steps = (f"{DIFFUSION_DPO} launchers/{name}:{line}" for line in lines)
    found = {
        "learning_rate": rate,
        "global_batch_size": Published(1 * 128 * 16, accumulation),
        "lr_schedule": Published("constant", schedule),
        "warmup_steps": Published(warmup, schedule),
        "max_steps": Published(2000, steps),
        "prompt_dropout": Published(0.2, f"{DIFFUSION_DPO} train.py:354"),
        "null_prompt": Published("empty", f"{DIFFUSION_DPO} train.py:{null_line}"),
        "flips": Published("image", f"{DIFFUSION_DPO} train.py:760"),
    }
    return found if beta is None else found | {"loss.beta": beta}


def of_the_paper(beta: float, batch: int) -> dict[str, Published]:
    """MaPO's paper, all weights."""
    details = f"{MAPO_PAPER} Training Details"
    return {
        "learning_rate": Published(1e-7, details),
        "global_batch_size": Published(batch, details),
        "loss.beta": Published(beta, f"{MAPO_PAPER} Table 4"),
        "lr_schedule": Published("cosine", details),
        "warmup_steps": Published(0, f"{details}, which name none"),
        "max_steps": Published(2000, details),
        "prompt_dropout": Published(0.0, f"{details}, which name none"),
        "null_prompt": Published("auto", f"{details}, which drop no prompt"),
        "flips": Published("pair", f"{MAPO} utils.py:232"),
    }


def unpublished(**values: Any) -> dict[str, Published]:
    return {name.replace("__", "."): Published(value, NONE) for name, value in values.items()}


SCALED = 1e-8 * 128 * 1 * 16  # --scale_lr: accumulation, pairs of a GPU, GPUs
DPO_SDXL = of_launcher(
    "sdxl.sh",
    beta=Published(5000.0, f"{DIFFUSION_DPO} launchers/sdxl.sh:21"),
    rate=Published(SCALED, f"{DIFFUSION_DPO} launchers/sdxl.sh:18"),
    warmup=200,
    null_line="396-397",
)

PUBLISHED: dict[str, dict[str, Published]] = {
    "mapo-paper-general": of_the_paper(8.0, 8 * 32 * 8),
    "mapo-paper-domains": of_the_paper(64.0, 128),
    "mapo-paper-personalization": {
        "learning_rate": Published(5e-5, f"{MAPO_PAPER} Training Details"),
        "global_batch_size": Published(5, f"{MAPO_PAPER} Training Details: the full train set, 5 images of a dog"),
        "loss.beta": Published(1024.0, f"{MAPO_PAPER} Table 4"),
        "lr_schedule": Published("constant", f"{DCO} customize.py:111"),
        "warmup_steps": Published(0, f"{DCO} customize.py:113"),
        "max_steps": Published(2000, f"{DCO} README.md:91"),
        "lora.rank": Published(32, f"{DCO} README.md:90"),
        "weight_decay": Published(1e-4, f"{DCO} customize.py:120"),
        "prompt_dropout": Published(0.0, NONE),
        "null_prompt": Published("auto", NONE),
    },
    "mapo-released": {
        "learning_rate": Published(1e-5, f"{MAPO} README.md:54"),
        "global_batch_size": Published(8 * 2 * 1, f"{MAPO} README.md:50-51"),
        "loss.beta": Published(0.1, f"{MAPO} args.py:160"),
        "loss.snr": Published(0.5, f"{MAPO} args.py:170"),
        "lr_schedule": Published("constant", f"{MAPO} README.md:55"),
        "warmup_steps": Published(0, f"{MAPO} README.md:56"),
        "max_steps": Published(2000, f"{MAPO} README.md:57"),
        "weight_decay": Published(0.01, f"{MAPO} args.py:217"),
        "max_grad_norm": Published(1.0, f"{MAPO} args.py:219"),
        "optimizer": Published("adamw_8bit", f"{MAPO} README.md:53"),
        "prompt_dropout": Published(0.0, f"{MAPO} utils.py:145-157"),
        "null_prompt": Published("auto", NONE),
        "flips": Published("pair", f"{MAPO} utils.py:232"),
    },
    "dpo-sdxl": DPO_SDXL,
    "dpo-sd15": of_launcher(
        "sd15.sh",
        beta=Published(2000.0, f"{DPO_PAPER} section 5, Hyperparameters"),
        rate=Published(SCALED, f"{DIFFUSION_DPO} launchers/sd15.sh:15"),
        warmup=500,
        null_line="739-740",
    ),
    "dpo-sdxl-lora": {
        "learning_rate": Published(1e-5, f"{DIFFUSERS} README.md:52"),
        "global_batch_size": Published(8 * 2 * 1, f"{DIFFUSERS} README.md:47-48"),
        "loss.beta": Published(5000.0, f"{DIFFUSERS} train_diffusion_dpo_sdxl.py:328"),
        "lr_schedule": Published("constant", f"{DIFFUSERS} README.md:54"),
        "warmup_steps": Published(0, f"{DIFFUSERS} README.md:55"),
        "max_steps": Published(2000, f"{DIFFUSERS} README.md:56"),
        "lora.rank": Published(8, f"{DIFFUSERS} README.md:51"),
        "prompt_dropout": Published(0.0, f"{DIFFUSERS} train_diffusion_dpo_sdxl.py:823"),
        "null_prompt": Published("auto", NONE),
        "flips": Published("pair", f"{DIFFUSERS} train_diffusion_dpo_sdxl.py:803"),
    },
    "sft": of_launcher(
        "sdxl.sh",
        beta=None,
        rate=Published(1e-9 * 128 * 1 * 16, f"{DPO_PAPER} section 5"),
        warmup=200,
        null_line="396-397",
    ),
    "ipo": {name: Published(each.value, f"{NONE}; that of dpo") for name, each in DPO_SDXL.items()}
    | {"loss.beta": Published(2500.0, f"{DIFFUSERS} train_diffusion_dpo.py:303")},
    "orpo": {
        "learning_rate": Published(3e-5, f"{ORPO_README} README.md:49"),
        "global_batch_size": Published(8 * 8, f"{DIFFUSERS} train_diffusion_orpo_sdxl_lora_wds.py:262"),
        "loss.beta": Published(0.1, f"{DIFFUSERS} train_diffusion_orpo_sdxl_lora_wds.py:310"),
        "lr_schedule": Published("constant", f"{ORPO_README} README.md:51"),
        "warmup_steps": Published(0, f"{ORPO_README} README.md:52"),
        "max_steps": Published(50_000, f"{ORPO_README} README.md:53"),
        "lora.rank": Published(8, f"{ORPO_README} README.md:47"),
        "prompt_dropout": Published(0.0, NONE),
        "null_prompt": Published("auto", NONE),
        "flips": Published("pair", f"{DIFFUSERS} train_diffusion_orpo_sdxl_lora_wds.py:550"),
    },
    "simpo": unpublished(
        learning_rate=1e-5, global_batch_size=16, loss__beta=100.0, loss__gamma=1.0, lr_schedule="constant",
        warmup_steps=0, max_steps=500, prompt_dropout=0.0, null_prompt="auto",
    ),
}  # fmt: skip
"""Recipe -> key of `train` -> what was published: written from the sources, not from the recipes."""

REQUIRED = {
    "learning_rate", "global_batch_size", "lr_schedule", "warmup_steps", "max_steps", "prompt_dropout", "null_prompt",
}  # fmt: skip


def load(file: Path, *overrides: str) -> RunConfig:
    return parse_config(file.read_text(), overrides, source=file.name)


def section(file: Path) -> TrainConfig:
    train = load(file).train
    assert train is not None
    return train


def value_of(train: TrainConfig, key: str) -> Any:
    head, _, rest = key.partition(".")
    if head == "loss":
        return train.loss_parameters[rest]
    found = getattr(train, head)
    return getattr(found, rest) if rest else found


def test_there_is_a_recipe_for_every_method_that_says_so_and_each_is_in_the_table() -> None:
    assert {file.stem for file in FILES} == set(PUBLISHED)
    methods = {section(file).method for file in FILES}
    assert methods == WITH_RECIPE >= {"mapo", "mapo_paper", "sft", "dpo", "ipo", "simpo", "orpo"}
    assert METHODS["mapo_paper_linear"].recipe == "mapo_paper", "the paper's other reading is the same recipe"
    assert "-o train.method=mapo_paper_linear" in (RECIPES / "mapo-paper-general.yaml").read_text()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_has_the_published_settings(file: Path) -> None:
    train, published = section(file), PUBLISHED[file.stem]
    assert set(published) >= REQUIRED | {f"loss.{name}" for name in METHODS[train.method].parameters}
    for key, expected in published.items():
        found = value_of(train, key)
        if isinstance(expected.value, float):
            assert math.isclose(found, expected.value, rel_tol=1e-12), f"{key}: {expected.source}"
        else:
            assert found == expected.value, f"{key}: {expected.source}"
    assert train.labels == "hard", "none of them has vote shares"
    assert (train.flips != "none") == load(file).encode.flips  # type: ignore[union-attr]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_names_the_source_of_each_setting(file: Path) -> None:
    text = file.read_text()
    for key, expected in PUBLISHED[file.stem].items():
        assert SOURCE.fullmatch(expected.source), f"{key}: {expected.source}"
        if expected.source.startswith("arXiv"):
            assert " ".join(expected.source.split()[:2]) in text
        elif expected.source.startswith(NONE):
            assert NONE in text or key in ("null_prompt", "prompt_dropout")
        else:
            repository, commit, place = expected.source.split()
            assert repository in text
            assert commit in text
            assert place.rpartition("/")[2] in text, f"{key}: {place}"
    assert f"docs/guides/recipes/{section(file).method}.md" in text


@pytest.mark.parametrize("method", sorted(WITH_RECIPE))
def test_every_method_has_a_page_with_its_recipes_and_the_lines_of_their_sources(method: str) -> None:
    text = (PAGES / f"{method}.md").read_text()
    for file in FILES:
        if section(file).method != method:
            continue
        assert f"`{file.name}`" in text
        for key, expected in PUBLISHED[file.stem].items():
            if place := re.search(r"[\w./]+:\d+", expected.source):
                assert place[0].rpartition("/")[2] in text, f"{file.stem}, {key}: {place[0]}"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_default_rate_of_all_weights_and_of_adapters_with_a_source(method: str) -> None:
    for with_adapters in (False, True):
        rate = default_rate(method, with_adapters=with_adapters)
        assert 0 < rate.value < 1e-3
        assert re.search(r"[\w./]+:\d+|arXiv \d{4}\.\d{5}|none published; that of \w+", rate.source)
        train = TrainConfig.model_validate({"method": method} | ({"lora": {"rank": 4}} if with_adapters else {}))
        assert train.learning_rate == rate.value
        assert training_settings(train)["learning_rate"]["source"].endswith(rate.source)
    assert METHODS[method].adapter_rate.value >= 1e-5, "adapters start from zero: a small rate teaches them nothing"


def test_defaults_are_those_of_the_recipes() -> None:
    """A bare `method: dpo` trains at the rate of dpo's recipe, and the paper's general alignment stays what it was."""
    assert default_rate("mapo_paper", with_adapters=False).value == 1e-7
    for name, published in PUBLISHED.items():
        train = section(RECIPES / f"{name}.yaml")
        expected = default_rate(train.method, with_adapters=train.lora is not None)
        assert math.isclose(published["learning_rate"].value, expected.value, rel_tol=1e-12), name


def test_the_plan_says_which_rate_was_taken_and_why() -> None:
    (left_out,) = training_notes(TrainConfig(lora={"rank": 4}))
    assert left_out == (
        "learning rate 5e-05 (adapters, mapo_paper: arXiv 2406.06424v2, Training Details, the UNet of personalization)"
    )
    assert training_notes(TrainConfig(learning_rate=1e-6)) == ["learning rate 1e-06 (set)"]
    (of_dpo,) = training_notes(TrainConfig(method="dpo"))
    assert of_dpo.startswith("learning rate 2.048e-05 (all weights, dpo: SalesforceAIResearch/DiffusionDPO")
    config = TrainConfig()
    begun = config.model_copy(update={"learning_rate": 3e-7})
    assert training_notes(config, begun) == ["learning rate 3e-07 (as this training began)"]
    assert learning_rate(TrainConfig(learning_rate=1e-7)) == {"value": 1e-7, "source": "set", "is_set": True}


def test_adapters_at_a_rate_that_teaches_them_nothing_are_warned_of() -> None:
    _, warning = training_notes(TrainConfig(lora={"rank": 4}, learning_rate=1e-7))
    assert warning == ("warning: adapters learn next to nothing at a learning rate of 1e-07; the default is 5e-05")
    assert len(training_notes(TrainConfig(lora={"rank": 4}, learning_rate=1e-6))) == 1
    assert len(training_notes(TrainConfig(learning_rate=1e-9))) == 1, "all weights start from the base"


def test_the_rate_of_prodigy_is_a_factor_and_others_than_1_are_warned_of() -> None:
    for method, lora in (("mapo_paper", None), ("dpo", {"rank": 4})):
        (note,) = training_notes(TrainConfig(method=method, lora=lora, optimizer="prodigy"))
        assert note == "learning rate 1 (prodigy: konstmish/prodigy, README.md: lr=1 for all networks)"
    _, warning = training_notes(TrainConfig(optimizer="prodigy", learning_rate=1e-7))
    told = "warning: prodigy estimates its own step size, and a learning rate of 1e-07 multiplies it"
    assert warning.startswith(told)
    assert "`train.prodigy.d_coef`" in warning
    assert TrainConfig(optimizer="adafactor").learning_rate == TrainConfig().learning_rate


def test_a_dry_run_has_the_rate_in_its_lines_and_as_fields(folder: Path, tiny_pipeline: Path) -> None:
    config = small(
        folder, tiny_pipeline, RECIPES / "orpo.yaml", **{"train.learning_rate": 1e-8, "storage": folder / "no"}
    )
    plan_of_run = plan_run(config)
    described, lines = plan_of_run.to_json(), plan_of_run.lines()
    plan = next(plan for plan in described["stages"] if plan["stage"] == "train")
    assert plan["state"] == "waits"
    assert plan["settings"] == {"learning_rate": {"value": 1e-8, "source": "set", "is_set": True}}
    place = next(n for n, line in enumerate(lines) if line.startswith("train "))
    assert [line.strip() for line in lines[place + 1 : place + 3]] == list(plan["remarks"])
    assert plan["remarks"][0] == "learning rate 1e-08 (set)"
    assert plan["remarks"][1].startswith("warning: adapters learn next to nothing")
    assert not any(plan["remarks"] for plan in described["stages"] if plan["stage"] != "train")


# two steps of each, on one encoded data set


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    write_parquet(folder / "pairs.parquet", photo_pairs(24, num_prompts=6))
    new_sd15_pipeline().save_pretrained(folder / "sd15", safe_serialization=True)
    return folder


def small(folder: Path, base: Path, file: Path, **changes: Any) -> RunConfig:
    """A recipe on a tiny base: sizes, files and devices are changed, and nothing that is about the method."""
    recipe = yaml.safe_load(file.read_text())
    is_sd15 = "stable-diffusion-v1-5" in recipe["encode"]["model"]
    recipe["encode"].pop("vae", None)
    overrides = {
        "storage": folder / "storage",
        "ingest.sources": f"[{{format: pickapic, path: {folder}/*.parquet}}]",
        "ingest.validation_ratio": 0.2,
        "encode.model": folder / "sd15" if is_sd15 else base,
        "encode.resolution": 64,
        "encode.device": "cpu",
        "train.device": "cpu",
        "train.num_workers": 1,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 2,
        "train.max_steps": 2,
        "train.precision": "fp32",
        "train.optimizer": "adamw",  # 8-bit states need a GPU
        **changes,
    }
    return parse_config(yaml.safe_dump(recipe), [f"{key}={value}" for key, value in overrides.items()])


FAST = ("dpo-sdxl", "orpo")
"""In every test run: one with a reference, dropped prompts and flips of images, one of adapters and flips of pairs."""
RUNS = [pytest.param(file, marks=() if file.stem in FAST else (pytest.mark.slow,), id=file.stem) for file in FILES]


@pytest.mark.parametrize("file", RUNS)
def test_a_recipe_trains_two_steps(ray_cluster: None, folder: Path, tiny_pipeline: Path, file: Path) -> None:
    config, said = small(folder, tiny_pipeline, file), list[str]()
    assert config.train is not None
    run_stages(config, ("ingest", "encode", "train"), said.append)
    record = Journal(Storage(config.storage), config.name).record("train")
    assert record is not None
    steps = record.details["history"]["steps"]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(step["loss"]) for step in steps)
    warmup = config.train.warmup_steps
    rate = PUBLISHED[file.stem]["learning_rate"].value
    assert steps[0]["learning_rate"] == pytest.approx(rate / warmup if warmup else rate)
    assert f"plan      {'':<21} learning rate {rate:.4g} (set)" in said
