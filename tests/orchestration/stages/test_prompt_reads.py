"""Prompts on an object store are read once by a command, however often it asks for its suites."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem

from orchestration.config import RunConfig, parse_config
from orchestration.driver.runner import plan_run
from orchestration.run.context import Run
from orchestration.stages.held_out import HeldOutPairs
from orchestration.stages.judged_suites import (
    judged_suites,
    max_samples,
    planned_suites,
    suites_identity,
    suites_without_pairs,
)
from orchestration.stages.registry import STAGES
from pipelines.dataset.errors import ConfigError, ModelError
from pipelines.dataset.storage import Storage
from pipelines.suites.benchmarks import COMPBENCH
from pipelines.suites.prompt_files import QUESTIONS, fetch_questions, fetch_set, publish_set, stored_name
from pipelines.suites.prompt_sets import PROMPT_SETS, read_canonical

SHARED = Path(__file__).parents[3].parent / "shared" / "benchmarks"
PLACE, SET = "memory://prompt-reads", "t2i-compbench"
needs_sets = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Counter[str]]]:
    """How often each object in memory was read, and looked up, by the end of its name."""
    found = {"cat_file": Counter[str](), "info": Counter[str]()}

    def count(method: str) -> None:
        original = getattr(MemoryFileSystem, method)

        def counting(self: MemoryFileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
            found[method][path.rpartition("/")[2]] += 1
            return original(self, path, *args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, method, counting)

    for method in found:
        count(method)
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "cache"))
    yield found
    MemoryFileSystem.store.clear()


def configuration(evaluate: dict[str, Any], **changes: Any) -> RunConfig:
    settings = {"name": "small", "storage": PLACE, "encode": {"model": "base"}, **changes}
    return parse_config(yaml.safe_dump(settings | {"evaluate": {"models": ["base"], **evaluate}}))


def publish_compbench(tmp_path: Path) -> str:
    """Publish the prompts of T2I-CompBench++ with questions; return the name of their file."""
    fetch_set(SET, SHARED / SET)
    rows = read_canonical(stored := (tmp_path / "cache" / "prompts" / f"{PROMPT_SETS[SET].sha256}.jsonl").read_bytes())
    asked: list[dict[str, Any]] = [{"parser": "none, for a test"}]
    asked += [{"prompt": each, "questions": ["a thing?"], "words": [["thing", "NOUN"]]} for each in
              dict.fromkeys(row.prompt for row in rows)]  # fmt: skip
    (tmp_path / QUESTIONS).write_text("\n".join(map(json.dumps, asked)))
    fetch_questions(PROMPT_SETS[SET], tmp_path)
    publish_set(SET, Storage(PLACE))
    assert Storage(PLACE).read(stored_name(PROMPT_SETS[SET])) == stored
    return stored_name(PROMPT_SETS[SET])


@needs_sets
def test_the_suites_of_one_set_read_it_once_and_each_look_asks_once_whether_it_changed(
    counted: dict[str, Counter[str]], tmp_path: Path
) -> None:
    stored, config = publish_compbench(tmp_path), configuration({"suites": [SET]})
    files = {stored.rpartition("/")[2], f"{SET}.{QUESTIONS}"}
    for counts in counted.values():
        counts.clear()
    held_out = HeldOutPairs(Storage(PLACE), None)
    suites = suites_without_pairs(config)
    looks = [
        suites, suites_identity(config), planned_suites(config), judged_suites(config, held_out), max_samples(config)
    ]  # fmt: skip
    assert len(suites) == len(COMPBENCH) > 4
    assert {name: counted["cat_file"][name] for name in files} == dict.fromkeys(files, 1)
    num_infos = len(looks) + 1  # a read checks the length
    assert {name: counted["info"][name] for name in files} == dict.fromkeys(files, num_infos)


@needs_sets
def test_a_set_that_is_damaged_or_taken_away_while_a_driver_runs_is_noticed(
    counted: dict[str, Counter[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, config = publish_compbench(tmp_path), configuration({"suites": [SET]})
    before = suites_identity(config)
    data = Storage(PLACE).read(stored)
    Storage(PLACE).write(stored, data.replace(b"a", b"b", 1))
    with pytest.raises(ModelError, match="damaged"):
        suites_identity(config)
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "empty"))
    Storage(PLACE).delete(stored)
    with pytest.raises(ModelError, match="are missing"):
        suites_identity(config)
    Storage(PLACE).write(stored, data)
    assert suites_identity(config) == before


def test_a_plan_reads_own_prompts_once_and_the_next_one_sees_other_prompts(
    counted: dict[str, Counter[str]], tiny_pipeline: Path, tmp_path: Path
) -> None:
    storage = Storage(PLACE)
    own = {"prompts": f"{PLACE}/own.txt", "scorers": ["saturation"], "dtype": "float32"}
    config = configuration(own, storage=str(tmp_path), encode={"model": str(tiny_pipeline), "resolution": 64})
    storage.write("own.txt", b"a red house\na blue sea\n")
    counted["cat_file"].clear()
    run = Run.open(config, lambda line: None)
    STAGES["evaluate"].check(run)
    keys = [STAGES["evaluate"].look(run).key for _ in range(2)]
    assert plan_run(config).stages[0].work == {"samples": 2}
    assert counted["cat_file"]["own.txt"] == 1
    storage.write("own.txt", b"a red horse\na blue sea\n")
    counted["cat_file"].clear()
    again = [STAGES["evaluate"].look(run).key for _ in range(2)]  # of the same driver
    assert counted["cat_file"]["own.txt"] == 1
    assert len({*keys, *again}) == 2
    storage.delete("own.txt")
    with pytest.raises(ConfigError, match=r"there is no file memory://prompt-reads/own\.txt"):
        STAGES["evaluate"].look(run)
