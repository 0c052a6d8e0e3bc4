"""The stage `evaluate`: what is there is not made again, every model and suite is judged, and errors come first."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import yaml
from checkpoints import trained_weights, write_checkpoint
from factories import new_pipeline, photo_pairs
from kept import keep_rows

from orchestration.cli import main
from orchestration.config import RunConfig, parse_config
from orchestration.driver.runner import run_stages
from orchestration.run.context import Run
from orchestration.stages.registry import STAGES
from orchestration.stages.stage import StageState
from pipelines.dataset.errors import ConfigError, ModelError
from pipelines.dataset.layout import SAMPLES, SCORES, fingerprints, pairs_table, samples_table
from pipelines.dataset.pair import prompt_id
from pipelines.dataset.storage import Storage
from pipelines.suites.evaluation import EvaluationRecord
from training.spec import base_digest

PIXELS = ["saturation", "dark_share"]
PROMPTS = ["a red house", "a blue sea", "two dogs in the snow"]
WORKER = {
    "rank": 0, "world_size": 1, "node": "n", "pid": 1, "device": "cpu", "backend": "gloo", "zero_stage": 2,
    "num_pairs": 64, "digest": "d" * 16,
}  # fmt: skip
CHECKPOINTS = "runs/small/checkpoints/0123"
SNAPSHOT = {"pairs_version": 0, "latents_fingerprint": "l" * 32, "latents_version": 0, "text_fingerprint": "t" * 32}

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler


def configuration(folder: Path, base: Path, evaluate: Mapping[str, Any], **sections: Any) -> RunConfig:
    """A run that judges models, with its file of prompts."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    settings: dict[str, Any] = {
        "name": "small",
        "storage": str(folder / "storage"),
        "encode": {"model": str(base), "resolution": 64, "device": "cpu"},
        "evaluate": {"prompts": str(folder / "prompts.txt"), "num_inference_steps": 1, "scorers": PIXELS, **evaluate},
        **sections,
    }
    return parse_config(yaml.safe_dump(settings))


def evaluated(config: RunConfig) -> EvaluationRecord:
    """Run the stage, and return its record."""
    (result,) = run_stages(config, ["evaluate"], lambda line: None)
    return EvaluationRecord.from_json(result.details)


def rows(config: RunConfig) -> dict[str, list[dict[str, Any]]]:
    """The samples of each model with each setting."""
    storage = Storage(config.storage)
    return {each: samples_table(storage, each).read().to_pylist() for each in fingerprints(storage, SAMPLES)}


def keys(config: RunConfig) -> set[str]:
    return {row["sample_key"] for each in rows(config).values() for row in each}


def results(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Storage(config.storage).read("runs/small/evaluation/results.json"))
    return found["suites"]


def written(folder: Path) -> dict[str, int]:
    """Every file of the data set, and when it was written."""
    return {str(file): file.stat().st_mtime_ns for file in (folder / "storage" / "dataset").rglob("*.*")}


def test_own_prompts_are_judged_without_training_and_only_what_is_new_is_made(
    ray_cluster: None, tiny_pipeline: Path, tmp_path: Path
) -> None:
    config = configuration(tmp_path, tiny_pipeline, {"images_per_prompt": 2})
    record = evaluated(config)
    suite = results(config)["prompts"]
    assert (suite["num_prompts"], suite["images_per_prompt"]) == (3, 2)
    assert suite["leaked_prompts"] is None, "nothing was trained"
    assert list(suite["models"]) == ["base"]
    for name in PIXELS:
        score = suite["models"]["base"][name]
        assert score["n"] == 3
        assert score["low"] <= score["mean"] <= score["high"]
    assert record.cost is not None
    assert record.cost.images == 6
    drawn, files = keys(config), written(tmp_path)
    assert len(drawn) == 6
    assert STAGES["evaluate"].look(Run.open(config, lambda line: None)).is_done

    results_file = tmp_path / "storage" / "runs" / "small" / "evaluation" / "results.json"
    written_results = results_file.read_bytes()
    results_file.unlink()  # as a later evaluation that failed leaves it
    assert not STAGES["evaluate"].look(Run.open(config, lambda line: None)).is_done
    assert evaluated(config).cost.images == 0  # type: ignore[union-attr]
    assert results_file.read_bytes() == written_results

    more = configuration(tmp_path, tiny_pipeline, {"images_per_prompt": 2, "scorers": [*PIXELS, "edge_density"]})
    assert evaluated(more).cost.images == 0  # type: ignore[union-attr]
    new = {name for name in written(tmp_path) if name not in files}
    assert new
    assert all("/scores/edge_density@" in name for name in new), "a new scorer draws nothing, and no other scores"

    config = configuration(tmp_path, tiny_pipeline, {"images_per_prompt": 2})
    (tmp_path / "prompts.txt").write_text("\n".join([PROMPTS[0], "a green hill", *PROMPTS[1:]]) + "\n")
    assert evaluated(config).cost.images == 2  # type: ignore[union-attr]
    added = [row for each in rows(config).values() for row in each if row["sample_key"] not in drawn]
    assert {row["prompt"] for row in added} == {"a green hill"}
    assert drawn < keys(config)


def test_models_by_name_are_drawn_with_the_noise_of_the_base(
    ray_cluster: None, tiny_pipeline: Path, tmp_path: Path
) -> None:
    new_pipeline(seed=9).unet.save_pretrained(tmp_path / "other" / "unet")
    new_pipeline(seed=11).save_pretrained(tmp_path / "whole")
    models = [
        "base",
        {"name": "unet", "model": str(tmp_path / "other"), "unet": True},
        {"name": "whole", "model": str(tmp_path / "whole")},
    ]
    config = configuration(tmp_path, tiny_pipeline, {"models": models, "suites": ["prompts", "starter"]})
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"limit_prompts": 2})})
    record = evaluated(config)
    suites = results(config)
    assert list(suites) == ["prompts", "starter"]
    for suite in suites.values():
        assert suite["num_prompts"] == 2
        assert list(suite["models"]) == ["base", "unet", "whole"]
        assert list(suite["against"]) == ["unet", "whole"]
        for model in ("unet", "whole"):
            for name in PIXELS:
                compared = suite["against"][model][name]
                assert {"difference", "low", "high", "win_rate", "win_low", "win_high", "ties"} <= compared.keys()
    assert any("departs from its protocol" in warning for warning in record.warnings)
    found = rows(config)
    assert sorted(len(each) for each in found.values()) == [4, 4, 4]
    noise = [{(row["prompt_id"], row["index"]): row["seed"] for row in each} for each in found.values()]
    assert noise[0] == noise[1] == noise[2]
    images = [{row["prompt_id"]: row["sha256"] for row in each} for each in found.values()]
    assert all(len({each[one] for each in images}) == 3 for one in images[0])
    gallery = [image.name for entry in record.gallery for image in entry.images.values()]
    assert gallery
    for name in gallery:
        assert Storage(config.storage).read(f"runs/small/evaluation/{name}").startswith(b"\x89PNG")


def test_a_judge_whose_scores_are_not_imported_stops_nothing(
    ray_cluster: None, tiny_pipeline: Path, tmp_path: Path
) -> None:
    config = configuration(tmp_path, tiny_pipeline, {"scorers": [*PIXELS, "imported:mine"]})
    record = evaluated(config)
    suite = results(config)["prompts"]
    assert suite["scorers"] == suite["primary"] == PIXELS
    assert [(each["name"], each["num_missing"]) for each in suite["missing"]] == [("mine", 3)]
    assert any("suite prompts has no numbers of mine: 3 of 3 images" in warning for warning in record.warnings)
    images = [{"image_sha256": row["sha256"], "prompt_id": row["prompt_id"], "value": 0.5}
              for each in rows(config).values() for row in each]  # fmt: skip
    (tmp_path / "scores.jsonl").write_text("\n".join(map(json.dumps, images)))
    named = ["--scorer", "mine", "--fingerprint", "a test"]
    assert main(["scores", "import", str(tmp_path / "scores.jsonl"), config.storage, *named]) == 0
    assert evaluated(config).cost.images == 0  # type: ignore[union-attr]
    suite = results(config)["prompts"]
    assert (suite["models"]["base"]["mine"]["mean"], suite["missing"]) == (0.5, [])


def trained(config: RunConfig) -> list[str]:
    """What a training of two checkpoints leaves behind, on a data set of photos; gives their folders."""
    run = Run.open(config, lambda line: None)
    assert config.train is not None
    assert config.encode is not None
    folders = [
        write_checkpoint(run.storage, CHECKPOINTS, step, trained_weights(new_pipeline(seed=seed)))
        for step, seed in ((4, 5), (8, 6))
    ]
    details = {
        "checkpoint": folders[-1], "best_checkpoint": folders[0], "steps": 8, "digest": "c0ffee", "starts": 1,
        "history": {"steps": [], "validations": []}, "workers": [WORKER], "seed": 0, "manifests": {},
        "snapshot": SNAPSHOT | {"text_version": 0, "pairs_version": pairs_table(run.storage).version},
        "base_digest": base_digest(config.encode.source), "config": config.train.model_dump(mode="json"),
    }  # fmt: skip
    run.journal.finish("train", key="0123", summary="8 steps", seconds=1, details=details)
    return folders


def test_held_out_prompts_checkpoints_and_the_agreement_of_judges_with_people(
    ray_cluster: None, tiny_pipeline: Path, tmp_path: Path
) -> None:
    evaluate = {"prompts": None, "num_samples": 5, "models": ["base", "aligned", "checkpoints"]}
    config = configuration(
        tmp_path, tiny_pipeline, evaluate,
        train={"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 8},
        ingest={"sources": [{"format": "pickapic", "path": str(tmp_path / "*.parquet")}]},
    )  # fmt: skip
    storage = Storage(config.storage)
    keep_rows(storage, tmp_path / "photos.parquet", photo_pairs(16, num_prompts=4), validation_ratio=0.5)
    trained(config)
    run_stages(config, ["export"], lambda line: None)
    record = evaluated(config)
    suite = results(config)["held-out"]
    held_out = pairs_table(storage).read(["prompt_id", "split", "status"])
    kept = held_out.filter(pc.equal(held_out["status"], "kept"))
    split = "validation" if "validation" in kept["split"].to_pylist() else "train"
    distinct = sorted(set(kept.filter(pc.equal(kept["split"], split))["prompt_id"].to_pylist()))
    assert suite["num_prompts"] == min(5, len(distinct))
    assert suite["leaked_prompts"] == (0 if split == "validation" else suite["num_prompts"])
    assert suite["images_per_prompt"] == max(1, 5 // len(distinct))
    assert list(suite["models"]) == ["base", "aligned", "step-4", "step-8"]
    same = [suite["models"][model]["saturation"]["mean"] for model in ("aligned", "step-8")]
    assert same[0] == pytest.approx(same[1], abs=1e-3), "the last checkpoint is what was exported"
    assert not [name for name in storage.names("runs/small/evaluation") if "unets" in name]
    audited = record.audit["saturation"]
    assert audited.n > 0
    assert audited.low <= audited.rate <= audited.high  # type: ignore[operator]
    base, *_ = (each for each in rows(config).values())
    before = keys(config)
    write_checkpoint(storage, CHECKPOINTS, 12, trained_weights(new_pipeline(seed=7)))
    assert evaluated(config).cost.images == len(base)  # type: ignore[union-attr]
    assert before < keys(config), "a new checkpoint leaves all other samples alone"
    page = run_stages(config, ["report"], lambda line: None)
    assert page[0].state is StageState.DONE
    html = (tmp_path / "storage" / "runs" / "small" / "report" / "index.html").read_text()
    board = (tmp_path / "storage" / "runs" / "small" / "evaluation" / "leaderboard.html").read_text()
    for text in ("saturation", "held-out"):
        assert text in html
        assert text in board


@pytest.mark.parametrize(
    ("evaluate", "error", "message"),
    [
        ({"scorers": ["pickscore"]}, ModelError, "pickscore"),
        ({"scorers": ["nothing"]}, ConfigError, "there is no scorer nothing"),
        ({"scorers": ["none.such:Scorer"]}, ConfigError, "none.such"),
        ({"suites": ["nothing"]}, ConfigError, "there is no suite nothing"),
        ({"prompts": "none.txt"}, ConfigError, "none.txt"),
        ({"models": ["base", {"name": "x", "model": "/none/such"}]}, ConfigError, "the model of x is not there"),
        ({"models": ["base", {"name": "x", "lora": "/none/such"}]}, ConfigError, "the lora of x is not there"),
        ({"against": "aligned"}, ConfigError, "there is no model aligned without training"),
    ],
)
def test_what_cannot_work_is_refused_before_ray_is_asked_for_anything(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluate: dict[str, Any],
    error: type[Exception], message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # nobody is there
    config = configuration(tmp_path, tiny_pipeline, evaluate)
    with pytest.raises(error, match=message) as caught:
        run_stages(config, ["evaluate"], lambda line: None)
    assert caught.value.hint  # type: ignore[attr-defined]
    assert not (tmp_path / "storage" / "dataset").exists()


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"scorers": ["saturation", {"name": "saturation", "batch_size": 1}]}, "saturation is there twice"),
        ({"suites": ["starter", "starter@1"]}, "starter is there twice"),
        ({"suites": [], "prompts": None}, "name at least one"),
        ({"models": ["base", {"name": "step-4", "model": "m"}]}, "step-4"),
        ({"models": ["base", {"name": "x"}]}, "set `model`, `lora` or both"),
        ({"models": ["aligned"]}, "against: base is not one of the models aligned"),
        ({"models": ["base", "other"]}, "other is not base, aligned or checkpoints"),
        ({"resolution": 65}, "resolution must be a multiple of 8"),
    ],
)
def test_what_a_configuration_cannot_mean_is_an_error(
    tiny_pipeline: Path, tmp_path: Path, evaluate: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration(tmp_path, tiny_pipeline, evaluate)


def test_a_plan_counts_the_missing_samples_without_a_cluster(tiny_pipeline: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, tiny_pipeline, {"images_per_prompt": 2})
    assert amount_of(config) == {"samples": 6}
    asks = configuration(tmp_path, tiny_pipeline, {}, encode={"model": str(tiny_pipeline), "resolution": 64})
    assert amount_of(asks) == {"samples": 3}, "`device: auto` asks the cluster, which a plan does not need"


def amount_of(config: RunConfig) -> Mapping[str, int]:
    return STAGES["evaluate"].look(Run.open(config, lambda line: None)).amount()


def test_a_plan_says_what_blocks(tiny_pipeline: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, tiny_pipeline, {"scorers": ["nothing"]})
    keep_rows(Storage(config.storage), tmp_path / "photos.parquet", photo_pairs(4, num_prompts=2))
    with pytest.raises(ConfigError, match="there is no scorer nothing") as caught:
        STAGES["evaluate"].look(Run.open(config, lambda line: None))
    assert caught.value.hint


def test_a_sample_is_of_its_bare_prompt(ray_cluster: None, tiny_pipeline: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, tiny_pipeline, {"scorers": []})
    record = evaluated(config)
    assert record.results.suites["prompts"].scorers == ()
    (found,) = rows(config).values()
    assert {(row["prompt"], row["text"], row["prompt_id"]) for row in found} == {
        (prompt, prompt, prompt_id(prompt)) for prompt in PROMPTS
    }
    assert not fingerprints(Storage(config.storage), SCORES)
    facts = {tuple(row[name] for name in ("width", "height", "status", "variant")) for row in found}
    assert facts == {(64, 64, "kept", "plain")}
