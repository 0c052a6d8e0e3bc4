"""The suites of `seed@1` as a job on two nodes that share only S3: every judge is a tiny twin, two prompts of each."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from all_twins import write_twins
from ray_head import BIN, other_node, ray_head
from scorer_twins import CLIP_TOKENIZER

from pipelines.dataset.layout import SAMPLES, SCORES, fingerprints, samples_table
from pipelines.dataset.storage import Storage
from pipelines.scores.cluster_weights import locate_parts, publish, publish_records
from pipelines.scores.weights import parts_of
from pipelines.suites.benchmarks import BENCHMARKS, GROUPS
from pipelines.suites.prompt_files import QUESTIONS, fetch_questions, fetch_set, local_file, publish_set
from pipelines.suites.prompt_sets import PROMPT_SETS, read_canonical

SHARED = Path(__file__).parents[3].parent / "shared" / "benchmarks"
SETS = ("partiprompts", "pickapic-v2-test", "hpdv2", "geneval", "t2i-compbench")
MEMBERS = [each for each in BENCHMARKS if each.label in GROUPS["seed@1"]]


@pytest.fixture
def prepared(s3_storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A storage with all prompts, questions and judges in its cache."""
    if not SHARED.is_dir() or not CLIP_TOKENIZER.is_dir():
        pytest.skip("needs ../shared")
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "cache-of-user"))
    for name in SETS:
        fetch_set(name, SHARED / name)
    asked: list[dict[str, object]] = [{"parser": "the first word, for a test"}]
    for row in read_canonical(local_file(PROMPT_SETS["t2i-compbench"]).read_bytes()):
        if row.metadata["category"] in ("color", "shape", "texture", "complex"):
            words = [[each, "NOUN"] for each in row.prompt.split()]
            asked.append({"prompt": row.prompt, "questions": [f"{words[0][0]}?"], "words": words})
    (tmp_path / QUESTIONS).write_text("\n".join(map(json.dumps, asked)))
    fetch_questions(PROMPT_SETS["t2i-compbench"], tmp_path)
    write_twins(tmp_path / "twins")
    for name in SETS:
        publish_set(name, s3_storage)
    for scorer in dict.fromkeys(name for each in MEMBERS for name in each.scorers):
        parts = locate_parts(scorer, parts_of(scorer), None, tmp_path / "twins")
        publish(parts, s3_storage, print)
        publish_records(parts, s3_storage)
    return s3_storage


@pytest.mark.slow
def test_every_suite_of_the_seed_is_judged_by_every_judge(
    prepared: Storage, s3_server: dict[str, str], tiny_pipeline: Path, tmp_path: Path
) -> None:
    prepared.upload_folder("base", tiny_pipeline)
    here = tmp_path / "work"
    here.mkdir()
    settings = {
        "name": "seed",
        "storage": prepared.url,
        "encode": {"model": prepared.uri("base"), "resolution": 64, "device": "cpu"},
        "evaluate": {"suites": ["seed"], "models": ["base", {"name": "other", "model": prepared.uri("base")}],
                     "limit_prompts": 2, "images_per_prompt": 1, "num_inference_steps": 1, "resolution": 64,
                     "num_workers": 2, "batch_size": 4},
    }  # fmt: skip
    (here / "seed.yaml").write_text(yaml.safe_dump(settings))
    caches = [{"MAPO_CACHE": str(tmp_path / name)} for name in ("cache-of-head", "cache-of-node")]
    with ray_head(3, **s3_server, **caches[0]) as head, other_node(head, num_cpus=3, **s3_server, **caches[1]):
        done = subprocess.run(
            [BIN / "mapo", "submit", "seed.yaml", "--address", head.url, "--follow"], cwd=here, text=True,
            capture_output=True, env=head.environment(**s3_server), timeout=1200, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert prepared.exists("runs/seed/report/index.html")
    assert prepared.exists("runs/seed/evaluation/leaderboard.html")
    results = json.loads(prepared.read("runs/seed/evaluation/results.json"))["suites"]
    assert list(results) == list(GROUPS["seed@1"])
    for each in MEMBERS:
        found = results[each.label]
        assert found["num_prompts"] == 2
        assert f"2 of {each.count:,} prompts".replace(",", "") in found["protocol"].replace(",", "")
        for model in ("base", "other"):
            scores = found["models"][model]
            assert set(scores) - {"tags"} == set(each.scorers)
            for judge in each.scorers:
                assert scores[judge]["n"] == 2, (each.label, judge, found["failures"])
        for judge in each.scorers:  # the same model under two names: nothing may differ
            compared = found["against"]["other"][judge]
            assert (compared["difference"], compared["win_rate"], compared["ties"]) == (0.0, 0.5, 2)
    counts = [samples_table(prepared, each).count_rows() for each in fingerprints(prepared, SAMPLES)]
    assert sum(counts) == 2 * len(MEMBERS), "one set of samples for two names of one model"
    judged = {name.partition("@")[0] for name in fingerprints(prepared, SCORES)}
    assert judged == {name for each in MEMBERS for name in each.scorers}
