"""A stage looks once: what was shown is what is executed and recorded, whoever commits meanwhile."""

import ast
from dataclasses import asdict
from pathlib import Path

import pytest
from encode_steps import ingest_here
from factories import photo_pairs, write_parquet

import orchestration
from orchestration.cli import COMMANDS, parser
from orchestration.config import RunConfig
from orchestration.driver.runner import run_stages
from orchestration.driver.status import describe_run
from orchestration.run.context import Run
from orchestration.stages import encode, train
from orchestration.stages.registry import ALL_STAGES, STAGES
from orchestration.stages.stage import Look, StageState
from pipelines.config import EncodeConfig, IngestConfig, SourceConfig
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.storage import Storage
from training.config import TrainConfig
from training.spec import Snapshot, TrainSpec


@pytest.fixture
def config(tmp_path: Path, tiny_pipeline: Path) -> RunConfig:
    """A run of one step on eight pairs."""
    source = write_parquet(tmp_path / "in.parquet", photo_pairs(8, num_prompts=2))
    return RunConfig(
        name="small",
        storage=str(tmp_path / "storage"),
        ingest=IngestConfig(sources=(SourceConfig(format="pickapic", path=str(source)),)),
        encode=EncodeConfig(model=str(tiny_pipeline), resolution=64),
        train=TrainConfig(
            num_workers=1, device="cpu", global_batch_size=2, micro_batch_size=2, max_steps=1, precision="fp32"
        ),
    )


def test_what_another_writer_commits_between_look_and_work_changes_neither_work_nor_record(
    ray_cluster: None, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, looks, specs = Storage(config.storage), [], []
    more = iter([write_parquet(tmp_path / f"more-{seed}.parquet", photo_pairs(4, seed=seed)) for seed in (5, 6)])

    def look(run: Run, found=encode.look) -> Look:
        looks.append(found(run))
        return looks[-1]

    def spec_of(run: Run, found=train.train_spec) -> TrainSpec | None:
        specs.append(found(run))
        return specs[-1]

    def commit_before_the_work(line: str) -> None:
        if line.endswith(" …") and line.split()[0] in ("encode", "train"):
            ingest_here(storage, next(more))

    monkeypatch.setattr(encode, "look", look)
    monkeypatch.setattr(train, "train_spec", spec_of)
    run_stages(config, ("ingest", "encode"), commit_before_the_work)
    monkeypatch.undo()
    run = Run.open(config, print)
    record = run.journal.record("encode")
    assert record is not None
    assert len(looks) == 1
    assert record.key == looks[0].key
    assert record.details["versions"][0] == (pairs_table(storage).version or 0) - 1, "that of the look"
    assert encode.look(run).is_done, "what was committed meanwhile was encoded too, and the tables say so"

    monkeypatch.setattr(train, "train_spec", spec_of)
    run_stages(config, ("train",), commit_before_the_work)
    record = run.journal.record("train")
    assert record is not None
    assert len(specs) == 1, "asked once in the run"
    spec = specs[0]
    assert spec is not None
    assert record.key == spec.key
    assert record.details["snapshot"] == asdict(spec.snapshot)
    assert Snapshot(**record.details["snapshot"]).pairs_version == (pairs_table(storage).version or 0) - 1
    assert f"/checkpoints/{spec.key}/" in record.details["checkpoint"]


def test_a_run_looks_at_every_stage_once(config: RunConfig, ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ALL_STAGES:
        module = STAGES[name]._module()

        def look(run: Run, name: str = name, found=module.look) -> Look:
            seen.append(name)
            return found(run)

        monkeypatch.setattr(module, "look", look)
    results = run_stages(config, ("ingest", "report"), lambda line: None)
    assert seen == ["ingest", "report"]
    assert [(each.stage, each.state) for each in results] == [("ingest", "done"), ("report", "done")]
    seen.clear()
    again = run_stages(config, ("ingest", "report"), lambda line: None)
    assert seen == ["ingest", "report"]
    assert [each.state for each in again] == [StageState.UP_TO_DATE] * 2
    assert [each.key for each in again] == [each.key for each in results]


def test_every_stage_is_one_file_one_line_and_a_command() -> None:
    folder = Path(orchestration.__file__).parent / "stages"
    help_of = {command.name: command.help for command in COMMANDS} | {"report": STAGES["report"].help}
    for name, stage in STAGES.items():
        tree = ast.parse((folder / f"{name}.py").read_text())
        assert "look" in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}
        options = parser().parse_args([name, "photos.yaml"])
        assert callable(options.action)
        assert help_of[name] == stage.help


def test_status_and_plan_name_the_states_alike(config: RunConfig) -> None:
    states = {each.stage: each.state for each in describe_run(config).stages}
    assert states["ingest"] is StageState.TO_DO
    assert {states[name] for name in ("encode", "train", "export", "evaluate")} == {StageState.WAITS}
    without = RunConfig(name="small", storage=config.storage)
    states = {each.stage: each.state for each in describe_run(without).stages}
    assert states["train"] is StageState.NOT_SET
