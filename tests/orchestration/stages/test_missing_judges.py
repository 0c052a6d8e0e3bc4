"""Judges whose scores are not there: the suite is drawn and shown without them, and reduced anew once they have come.

Samples are drawn and scored in this process, with real tiny models: what `evaluate` then has to do needs no Ray.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from all_twins import write_twins
from drawings import draw_here
from factories import new_pipeline
from report_sample import Page
from scored_images import score_here
from scorer_twins import CLIP_TOKENIZER

from orchestration.config import RunConfig, parse_config
from orchestration.report.writer import write_report
from orchestration.run.context import Run
from orchestration.stages.evaluate import evaluation_of, notes
from orchestration.stages.evaluation import Evaluation
from orchestration.stages.evaluation_images import images_of
from orchestration.stages.judged_scorers import judges_of, scorers_identity
from orchestration.stages.registry import STAGES
from orchestration.stages.stage import Look
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.layout import SCORES, fingerprints
from pipelines.dataset.storage import Storage
from pipelines.samples.execution import read_samples
from pipelines.scores.cluster_weights import locate_parts, publish, publish_records
from pipelines.scores.foreign import read_foreign
from pipelines.scores.imported import foreign_judge
from pipelines.scores.imports import import_scores
from pipelines.scores.weights import parts_of
from pipelines.suites.prompt_files import QUESTIONS, fetch_questions, fetch_set, publish_set
from pipelines.suites.prompt_sets import PROMPT_SETS
from pipelines.suites.results import Results

SHARED = Path(__file__).parents[3].parent / "shared" / "benchmarks" / "t2i-compbench"
SPATIAL, COMPLEX = "t2i-compbench-spatial@1", "t2i-compbench-complex@1"
BLIP, CLIP, UNIDET, MERGED = "blip-vqa", "compbench-clip-complex", "compbench-2d-complex", "compbench-3-in-1"
ADJECTIVES = ("red", "green", "blue", "big", "small", "fluffy", "wooden", "metallic", "black", "white", "soft", "round")

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' Euler
    pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark's prompts are not on this machine"),
]


class Session:
    """One run whose samples are drawn here, and what it says."""

    def __init__(self, config: RunConfig) -> None:
        self.said: list[str] = []
        self.run = Run.open(config, self.said.append)
        self.storage: Storage = self.run.storage

    @property
    def evaluation(self) -> Evaluation:
        return evaluation_of(self.run, None, None)

    def draw(self) -> None:
        for cell in self.evaluation.cells:
            draw_here(self.storage, cell.drawing)

    def images(self, suite: str) -> pa.Table:
        """The images of a suite, with everything that its judges need."""
        evaluation = self.evaluation
        (own,) = (each for each in evaluation.suites if each.label == suite)
        judges = judges_of(self.run, evaluation.suites, evaluation.held_out)[own.name]
        cells = [cell for cell in evaluation.cells if cell.suite is own]
        return pa.concat_tables(images_of(read_samples(self.storage, each.drawing), judges, own) for each in cells)

    def score(self, suite: str) -> None:
        evaluation = self.evaluation
        judges = judges_of(self.run, evaluation.suites, evaluation.held_out)[suite.partition("@")[0]]
        score_here(self.storage, [judge for judge in judges if not judge.is_imported], self.images(suite))

    def look(self) -> Look:
        return STAGES["evaluate"].look(self.run)

    def evaluate(self) -> dict[str, Any]:
        """Do the work of the stage, and return the suites in `results.json`."""
        look = self.look()
        assert not look.is_done
        assert look.work is not None
        done = look.work()
        self.run.journal.finish("evaluate", key=str(look.key), summary=done.summary, seconds=1, details=done.details)
        text = self.storage.read("runs/small/evaluation/results.json")
        assert Results.from_json(json.loads(text)).to_json() == json.loads(text)
        found: dict[str, Any] = json.loads(text)["suites"]
        return found

    def pages(self) -> tuple[str, str]:
        """The words on the report and on the leaderboard."""
        write_report(self.run, command="mapo run", is_driven=False)
        names = ("report/index.html", "evaluation/leaderboard.html")
        html = (self.storage.read(f"runs/small/{name}").decode() for name in names)
        return tuple(re.sub(r"\s+", " ", Page(each).text) for each in html)  # type: ignore[return-value]


def bring(
    session: Session, folder: Path, scorer: str, images: Sequence[Mapping[str, Any]], text: str = "UniDet RS200"
) -> dict[str, float]:
    """Import a score for each image; the scores by image."""
    values = {each["image_sha256"]: int(each["image_sha256"][:6], 16) / 16**6 for each in images}
    rows = [{**{name: each[name] for name in ("image_sha256", "prompt_id")}, "value": values[each["image_sha256"]]}
            for each in images]  # fmt: skip
    (folder / "scores.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = read_foreign(folder / "scores.jsonl")
    import_scores(file, session.storage, foreign_judge(scorer, text, scale="0 to 1"))
    return values


def questions(prompts: Sequence[str], *, with_words: bool = True) -> str:
    """A file of questions; a few words are adjectives, all others nouns."""
    rows: list[dict[str, Any]] = [{"parser": "a test"}]
    for prompt in prompts:
        words = [[word, "ADJ" if word in ADJECTIVES else "NOUN"] for word in prompt.rstrip(".").split()]
        told = {"prompt": prompt, "questions": [f"{words[-1][0]}?"]}
        rows.append({**told, "words": words} if with_words else told)
    return "\n".join(map(json.dumps, rows))


@pytest.fixture
def new_session(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Session]:
    """Opens a run of two models on a few prompts of a suite."""
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "cache"))
    fetch_set("t2i-compbench", SHARED)
    new_pipeline(seed=9).unet.save_pretrained(tmp_path / "other" / "unet")

    def new(suites: Sequence[str], **evaluate: Any) -> Session:
        settings = {
            "name": "small",
            "storage": str(tmp_path / "storage"),
            "encode": {"model": str(tiny_pipeline), "resolution": 64, "device": "cpu"},
            "evaluate": {
                "suites": list(suites),
                "models": ["base", {"name": "other", "model": str(tmp_path / "other"), "unet": True}],
                "limit_prompts": 2, "images_per_prompt": 1, "num_inference_steps": 1, "resolution": 64, **evaluate,
            },
        }  # fmt: skip
        return Session(parse_config(yaml.safe_dump(settings)))

    return new


def written(folder: Path) -> dict[str, int]:
    """Every file of the data set, and when it was written."""
    return {str(file): file.stat().st_mtime_ns for file in (folder / "storage" / "dataset").rglob("*.*")}


def test_a_suite_without_its_judge_waits_and_is_reduced_anew_once_scores_have_come(
    new_session: Callable[..., Session], tmp_path: Path
) -> None:
    session = new_session([SPATIAL])
    planned = notes(session.run).remarks
    assert any(
        f"{SPATIAL} has no numbers of compbench-2d: no score was imported; score its" in each for each in planned
    )
    assert planned[-1:] == session.look().notes().remarks[-1:]
    session.draw()
    assert "4 of 4 images have no imported score" in session.look().notes().remarks[0]

    waiting = session.evaluate()[SPATIAL]
    assert (waiting["scorers"], waiting["primary"]) == ([], [])
    assert [each["name"] for each in waiting["missing"]] == ["compbench-2d"]
    assert (waiting["missing"][0]["num_missing"], waiting["missing"][0]["num_images"]) == (4, 4)
    assert list(waiting["models"]) == ["base", "other"]
    assert "without compbench-2d" in session.run.journal.record("evaluate").summary  # type: ignore[union-attr]
    line = f"evaluate  {SPATIAL.partition('@')[0]}@1 has no numbers of compbench-2d: 4 of 4 images have no imported"
    assert any(each.startswith(line) and "infra/compbench" in each for each in session.said), session.said
    for text in session.pages():
        assert f"suite {SPATIAL} has no numbers of compbench-2d: 4 of 4 images have no imported score" in text
        assert "waits for its scores" in text
        assert "No scores are configured" not in text
    look = session.look()
    assert look.is_done, "nothing has come"
    assert "mapo scores import" in look.notes().remarks[0]

    images = session.images(SPATIAL).to_pylist()
    bring(session, tmp_path, "compbench-2d", images[:3])
    assert "1 of 4 images have no imported score" in session.look().notes().remarks[0]
    part = session.evaluate()[SPATIAL]
    assert (part["scorers"], part["missing"][0]["num_missing"]) == ([], 1)
    assert part["models"]["base"] == {"tags": {}}, "a mean over a part of the images is of another protocol"
    assert session.look().is_done

    values = bring(session, tmp_path, "compbench-2d", images)
    files = written(tmp_path)
    whole = session.evaluate()[SPATIAL]
    assert written(tmp_path) == files, "nothing is drawn or scored again"
    assert (whole["scorers"], whole["primary"], whole["missing"]) == (["compbench-2d"], ["compbench-2d"], [])
    for model, own in (("base", images[:2]), ("other", images[2:])):
        mean = sum(values[each["image_sha256"]] for each in own) / 2
        assert whole["models"][model]["compbench-2d"]["mean"] == pytest.approx(mean)
    report, board = session.pages()
    assert "waits for its scores" not in report + board
    assert "compbench-2d" in board
    assert session.look().is_done
    assert session.look().notes().remarks == ()


def test_scores_under_two_fingerprints_are_told_apart_by_name(
    new_session: Callable[..., Session], tmp_path: Path
) -> None:
    session = new_session([SPATIAL])
    session.draw()
    assert scorers_identity(session.run, session.evaluation.held_out) == [], "the key is as without a foreign judge"
    images = session.images(SPATIAL).to_pylist()
    for text in ("UniDet RS200", "UniDet R50"):
        bring(session, tmp_path, "compbench-2d", images, text)
    (missing,) = session.evaluate()[SPATIAL]["missing"]
    assert "imported under 2 fingerprints" in missing["why"]
    assert "imported:compbench-2d@FINGERPRINT" in missing["hint"]
    own = foreign_judge("compbench-2d", "UniDet R50").fingerprint
    exact = new_session([SPATIAL], scorers=[f"imported:compbench-2d@{own[:8]}"])
    found = exact.evaluate()[SPATIAL]
    assert (found["scorers"], found["missing"]) == (["compbench-2d"], [])
    vague = new_session([SPATIAL], scorers=["imported:compbench-2d"])
    with pytest.raises(ConfigError, match="2 imported tables of compbench-2d"):
        vague.look()


def test_imported_scores_of_the_configuration_judge_the_suites_that_they_cover(
    new_session: Callable[..., Session], tmp_path: Path
) -> None:
    session = new_session([SPATIAL, "starter"], scorers=["imported:mine"])
    session.draw()
    session.score("starter@1")
    found = session.evaluate()
    assert [each["name"] for each in found["starter"]["missing"]] == ["mine"]
    assert found["starter"]["scorers"] == ["dark_share", "saturation", "edge_density", "colour_entropy"]
    assert "where the scorer runs" in found["starter"]["missing"][0]["hint"]
    bring(session, tmp_path, "mine", session.images("starter@1").to_pylist())
    found = session.evaluate()
    assert found["starter"]["missing"] == []
    assert found["starter"]["primary"] == ["mine"]
    missing = {each["name"]: each["num_missing"] for each in found[SPATIAL]["missing"]}
    assert missing == {"mine": 4, "compbench-2d": 4}


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one folder for each part."""
    if not CLIP_TOKENIZER.is_dir():
        pytest.skip("CLIP's tokenizer is not on this machine")
    folder = tmp_path_factory.mktemp("twins")
    write_twins(folder)
    return folder


@pytest.fixture
def complex_session(new_session: Callable[..., Session], twins: Path, tmp_path: Path) -> Callable[..., Session]:
    """Opens a run on the complex prompts, with tiny twins of BLIP and CLIP; its samples are drawn."""
    prompts = [each.strip() for each in (SHARED / "complex_val.txt").read_text().splitlines() if each.strip()]

    def new(*, with_words: bool = True) -> Session:
        (tmp_path / QUESTIONS).write_text(questions(prompts, with_words=with_words))
        fetch_questions(PROMPT_SETS["t2i-compbench"], tmp_path)
        session = new_session([COMPLEX], limit_prompts=12)
        publish_set("t2i-compbench", session.storage)
        for scorer in (BLIP, CLIP):
            parts = locate_parts(scorer, parts_of(scorer), None, twins)
            publish(parts, session.storage, lambda line: None)
            publish_records(parts, session.storage)
        session.draw()
        return session

    return new


def test_complex_prompts_are_judged_by_the_mean_of_their_parts(
    complex_session: Callable[..., Session], tmp_path: Path
) -> None:
    session = complex_session()
    session.score(COMPLEX)
    before = session.evaluate()[COMPLEX]
    assert (before["scorers"], before["primary"]) == ([BLIP, CLIP], [])
    assert {each["name"]: each["why"] for each in before["missing"]} == {
        UNIDET: "24 of 24 images have no imported score", MERGED: f"it needs {UNIDET}"
    }  # fmt: skip
    for text in session.pages():
        assert f"has no numbers of {MERGED}: it needs {UNIDET}" in text
    bring(session, tmp_path, UNIDET, session.images(COMPLEX).to_pylist())
    files = written(tmp_path)
    after = session.evaluate()[COMPLEX]
    assert written(tmp_path) == files
    assert (after["missing"], after["primary"]) == ([], [MERGED])
    assert set(after["tags"]) == {"spatial", "action", "spatialaction"}, "the choice has every kind"
    tags = after["models"]["base"]["tags"]
    for kind, parts in (("spatial", [BLIP, UNIDET]), ("action", [BLIP, CLIP]), ("spatialaction", [BLIP, UNIDET, CLIP])):
        means = [tags[kind][part]["mean"] for part in parts]
        assert tags[kind][MERGED]["mean"] == pytest.approx(sum(means) / len(means), abs=1e-9)
    assert after["against"]["other"][MERGED]["p_holm"] is not None
    assert after["num_primary_tests"] == 1
    report, board = session.pages()
    assert f"{MERGED} primary" in report
    assert "ranks first" in board or "share the first place" in board


def test_without_the_words_of_prompts_clip_and_the_merged_score_are_named_as_missing(
    complex_session: Callable[..., Session], tmp_path: Path
) -> None:
    session = complex_session(with_words=False)
    bring(session, tmp_path, UNIDET, session.images(COMPLEX).to_pylist())
    session.score(COMPLEX)
    found = session.evaluate()[COMPLEX]
    assert found["scorers"] == [BLIP, UNIDET]
    missing = {each["name"]: each for each in found["missing"]}
    assert missing[CLIP]["why"] == "its questions came without the words of the prompts"
    assert f"mapo suites fetch {COMPLEX} --from FOLDER" in missing[CLIP]["hint"]
    assert missing[MERGED]["why"] == f"it needs {CLIP}"
    assert not any(name.startswith(CLIP) for name in fingerprints(session.storage, SCORES))
    again = complex_session()
    assert not again.look().is_done, "other questions are other prompts"
