"""T2I-CompBench++ without its detectors: our rules against the official scripts (`record_compbench.py`)."""

import hashlib
import importlib.util
import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from compbench_cases import (
    Case,
    complex_cases,
    depth_cases,
    numeracy_cases,
    plane_cases,
    split_words,
    tagged,
)
from scored_images import formula_files

from benchmarks.compbench_questions import main as make_questions
from benchmarks.compbench_questions import prompts_in, questions_of
from pipelines.dataset.errors import SourceError
from pipelines.dataset.layout import SAMPLES_SCHEMA, samples_table
from pipelines.dataset.pair import prompt_id
from pipelines.dataset.shard import ShardWriter
from pipelines.dataset.storage import Storage
from pipelines.scores.foreign import read_foreign
from pipelines.scores.imported import foreign_judge
from pipelines.scores.imports import import_scores
from pipelines.suites.compbench.detections import Box, Detected, Protocol, as_detected, box_depth
from pipelines.suites.compbench.numeracy import NUMBERS, ONE, PLURALS, counted_in, score_numeracy
from pipelines.suites.compbench.spatial import LEAST_2D, score_2d, score_3d
from pipelines.suites.compbench.three_in_one import kind_of, three_in_one
from pipelines.suites.compbench.words import (
    DEPTH_RELATIONS,
    objects_of,
    objects_of_complex,
    relation_of,
    without_adjectives,
)
from pipelines.suites.questions import Word, read_questions

DATA = Path(__file__).parents[2] / "data" / "compbench" / "recorded.json"
SHARED = Path(__file__).parents[4] / "shared" / "benchmarks" / "t2i-compbench"
needs_prompts = pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark's prompts are not on this machine")


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DATA.read_text())
    return found


def detected(case: Case) -> list[Detected]:
    return as_detected(case.labels, case.scores, case.boxes)


def plane(case: Case, protocol: Protocol = "official") -> float:
    return score_2d(objects_of(case.words), relation_of(case.prompt), detected(case), protocol=protocol)


def complex_plane(case: Case, protocol: Protocol = "official") -> float:
    return score_2d(objects_of_complex(case.words), relation_of(case.prompt), detected(case), protocol=protocol)


def depth(case: Case, protocol: Protocol = "official") -> float:
    relation = relation_of(case.prompt, DEPTH_RELATIONS)
    return score_3d(objects_of(case.words), relation, detected(case), case.depth(), protocol=protocol)


def numeracy(case: Case) -> float:
    return score_numeracy(counted_in(split_words(case.prompt)), detected(case))


@pytest.mark.parametrize(
    ("name", "cases", "score", "least"),
    [
        ("plane", plane_cases, plane, 20),
        ("complex", complex_cases, complex_plane, 10),
        ("depth", depth_cases, depth, 50),
        ("numeracy", numeracy_cases, numeracy, 30),
    ],
)
def test_every_case_scores_as_the_official_script_does(
    name: str, cases: Callable[[], list[Case]], score: Callable[[Case], float], least: int, recorded: dict[str, Any]
) -> None:
    official = recorded[name]
    assert [score(case) for case in cases()] == pytest.approx(official, abs=1e-12)
    assert sum(each > 0 for each in official) >= least, "the cases tell right from wrong"
    assert len(set(official)) >= 8


def test_complex_prompts_merge_as_the_official_script_does(recorded: dict[str, Any]) -> None:
    if not SHARED.is_dir():
        pytest.skip("the benchmark's prompts are not on this machine")
    prompts, spatial, action = (
        (SHARED / f"complex_val{name}.txt").read_text().splitlines() for name in ("", "_spatial", "_action")
    )
    random = np.random.RandomState(recorded["three_in_one"]["seed"])
    parts = [np.round(random.rand(10 * len(prompts)), 4)[::10].tolist() for _ in range(3)]
    found = [
        three_in_one(kind_of(prompt, spatial, action), attribute=each[0], spatial=each[1], action=each[2])
        for prompt, each in zip(prompts, zip(*parts, strict=True), strict=True)
    ]
    assert found == pytest.approx(recorded["three_in_one"]["first_of_each_prompt"], abs=1e-12)
    assert {kind_of(each, spatial, action) for each in prompts} == {"spatial", "action", "spatialaction"}


def test_the_objects_are_those_of_the_benchmark(recorded: dict[str, Any]) -> None:
    assert recorded["plurals"] == PLURALS


def score_script() -> Any:
    """The script that runs in the container."""
    place = Path(__file__).parents[3] / "infra" / "compbench" / "score.py"
    spec = importlib.util.spec_from_file_location("compbench_score", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_samples(storage: Storage, cases: list[Case]) -> dict[bytes, Case]:
    """Write a sample for each case as `evaluate` does, and one twice; the cases by the bytes of their images."""
    out, rows = io.BytesIO(), []
    writer = ShardWriter(out)
    images = dict(zip(formula_files(len(cases)), cases, strict=True))
    for place, (png, case) in enumerate([*images.items(), next(iter(images.items()))]):
        named = {"prompt": case.prompt, "prompt_id": prompt_id(case.prompt)}
        member = writer.add(f"{place:032x}.png", png)
        writer.add(f"{place:032x}.json", json.dumps(named).encode())
        rows.append({**dict.fromkeys(SAMPLES_SCHEMA.names), **named, "status": "kept", "sha256": member.sha256})
    writer.close()
    storage.write("dataset/samples/f/u.tar", out.getvalue())
    samples_table(storage, "f").append("u", pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA))
    return images


@pytest.mark.parametrize(
    ("part", "cases", "name"), [("plane", plane_cases, "plane"), ("complex", complex_cases, "complex"),
                                ("depth", depth_cases, "depth"), ("numeracy", numeracy_cases, "numeracy")],
)  # fmt: skip
def test_what_the_container_writes_can_be_imported(
    part: str, cases: Callable[[], list[Case]], name: str, recorded: dict[str, Any], storage: Storage, tmp_path: Path
) -> None:
    script, chosen = score_script(), cases()[:12]
    images = write_samples(storage, chosen)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(dict.fromkeys(case.prompt for case in chosen)))
    words = {case.prompt: [[word.text, word.part] for word in case.words] for case in chosen}
    rows = [{"prompt": prompt, "questions": [], "words": found} for prompt, found in words.items()]
    questions = write(tmp_path / "questions.jsonl", [ROWS[0], *rows])
    arguments = [str(tmp_path / "storage" / "dataset" / "samples"), str(questions), str(tmp_path / "out.jsonl")]
    script.main(
        [*arguments, "--part", part, "--prompts", str(prompts)],
        lambda png: script.Seen(detected(images[png]), images[png].depth()),
    )
    file = read_foreign(tmp_path / "out.jsonl")
    judge = foreign_judge(*file.named(None, None))
    done = import_scores(file, storage, judge)
    assert (done.num_new, done.num_failed) == (12, 0)
    by_image = {each.image_sha256: each.value for each in file.scores}
    found = [by_image[hashlib.sha256(png).hexdigest()] for png in images]
    assert found == pytest.approx(recorded[name][:12], abs=1e-12)
    assert "protocol official, words by en_core_web_sm 3.5.0" in str(judge.shaping["imported"])
    prompts.write_text(prompts.read_text() + "\nanother prompt")
    with pytest.raises(SystemExit, match="no words of 1 of"):
        script.main([*arguments, "--part", part, "--prompts", str(prompts)], script.Seen)


@needs_prompts
def test_every_numeracy_prompt_counts_all_its_objects() -> None:
    for prompt in (SHARED / "numeracy_val.txt").read_text().splitlines():
        words = split_words(prompt)
        assert len(counted_in(words)) >= sum(word in NUMBERS and word not in ONE for word in words), prompt


def placed(label: str, left: float, top: float, score: float = 0.99) -> Detected:
    return Detected(label, score, Box(left, top, left + 50, top + 50))


@needs_prompts
def test_officially_32_of_58_spatial_prompts_can_only_score_zero() -> None:
    prompts = (SHARED / "complex_val_spatial.txt").read_text().splitlines()
    found: dict[str, list[float]] = {"official": [], "ours": []}
    for prompt in prompts:
        relation = relation_of(prompt)
        where = {"on the left of": (-100, 0), "on the right of": (100, 0)}.get(str(relation), (0, -100))
        image = [placed("a", 200 + where[0], 200 + where[1]), placed("b", 200, 200)]
        for protocol, scores in found.items():
            scores.append(score_2d(("a", "b"), relation, image, protocol=protocol))  # type: ignore[arg-type]
    assert len(prompts) == 58
    assert [sum(score == 0 for score in scores) for scores in found.values()] == [32, 0]
    assert found["ours"] == pytest.approx([0.995] * 58)


def test_a_higher_confidence_does_not_help_on_top_of_until_it_is_certain() -> None:
    image = [placed("a", 200, 100, 0.9999), placed("b", 200, 200, 0.9999)]
    assert score_2d(("a", "b"), "on top of", image) == 0 < LEAST_2D
    assert score_2d(("a", "b"), "on the top of", image) > LEAST_2D
    assert score_2d(("a", "b"), "on top of", image, protocol="ours") == score_2d(("a", "b"), "on the top of", image)


def test_officially_the_depth_of_a_box_is_that_of_the_box_at_its_mirrored_place() -> None:
    depth_HW = np.zeros((360, 480), np.float32)
    depth_HW[40:90, 300:350] = 1.0
    box = Box(300, 40, 350, 90)
    assert box_depth(depth_HW, box, "ours") == 1.0
    assert box_depth(depth_HW, box, "official") == 0.0
    beyond = Box(400, 40, 450, 90)
    assert np.isnan(box_depth(depth_HW, beyond, "official")), "column 400 is no row of 360"
    near, far = Detected("a", 1.0, box), Detected("b", 1.0, Box(310, 50, 380, 130))
    assert score_3d(("a", "b"), "in front of", [near, far], depth_HW) == 0.5
    assert score_3d(("a", "b"), "in front of", [near, far], depth_HW, protocol="ours") > 0.5


def test_both_protocols_differ_on_depth_alone_where_the_map_matters() -> None:
    cases = depth_cases()
    differ = [case for case in cases if depth(case) != depth(case, "ours")]
    assert 0 < len(differ) < len(cases)
    assert all(plane(case) == plane(case, "ours") for case in plane_cases())


def test_words_of_complex_prompts() -> None:
    assert objects_of_complex(tagged("The red cat was on top of the fluffy dog.")) == ("cat", "dog")
    assert objects_of_complex(tagged("The red cat was by the fluffy dog.")) is None
    assert without_adjectives(tagged("The red cat was by the fluffy dog.")) == "The cat was by the dog ."
    assert objects_of([Word("run", "VERB")]) is None


def test_lists_of_other_lengths_are_refused() -> None:
    case = replace(plane_cases()[0], labels=("cat",), scores=(0.5, 0.6), boxes=())
    with pytest.raises(ValueError, match="1 labels, 2 scores and 0 boxes"):
        detected(case)
    with pytest.raises(ValueError, match="counts no object"):
        score_numeracy([], [])


ROWS = [
    {"parser": "en_core_web_sm 3.5.0"},
    {"prompt": "a green bench", "questions": ["a green bench?"], "words": [["a", "DET"], ["bench", "NOUN"]]},
    {"prompt": "two cats", "questions": []},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in rows) + "\n\n")
    return path


def test_questions_are_read_with_their_parser(tmp_path: Path) -> None:
    found = read_questions(write(tmp_path / "q.jsonl", ROWS), ["two cats", "a green bench"])
    assert found.parser == "en_core_web_sm 3.5.0"
    assert found.asked == {"a green bench": ["a green bench?"], "two cats": []}
    assert found.words == {"a green bench": [Word("a", "DET"), Word("bench", "NOUN")]}
    assert found.column(["two cats", "a green bench"]) == ["[]", '["a green bench?"]']
    other = read_questions(write(tmp_path / "p.jsonl", [{"parser": "en_core_web_sm 3.8.0"}, *ROWS[1:]]))
    assert found.sha256 != other.sha256


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        (ROWS[1:], "does not name the parser"),
        ([ROWS[0], "{"], r"line 2: not valid JSON"),
        ([ROWS[0], [1]], r"line 2: not a JSON object"),
        ([ROWS[0], {"prompt": 3, "questions": []}], "`prompt` is 3, not a text"),
        ([ROWS[0], {"prompt": "a", "questions": "b"}], "`questions` is 'b', not a list of texts"),
        ([ROWS[0], {"prompt": "a", "questions": [], "words": [["a"]]}], "`words` is not a list of text"),
        ([*ROWS, ROWS[1]], r"line 4: the prompt 'a green bench' is there twice"),
        (ROWS[:2], r"lack 1 of 2 prompts, such as 'two cats'"),
        ([*ROWS, {"prompt": "more", "questions": []}], r"questions about 1 of 3, .*such as 'more'"),
    ],
)
def test_other_questions_are_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        read_questions(write(tmp_path / "q.jsonl", rows), ["a green bench", "two cats"])
    assert caught.value.hint
    with pytest.raises(SourceError, match="cannot read the questions"):
        read_questions(tmp_path / "none.jsonl")


def test_the_questions_of_a_prompt_are_its_noun_chunks_but_for_places() -> None:
    chunks = ["a green bench", "the left", "a blue bowl", "the side", "top", "the right", "the top"]
    assert questions_of(chunks) == ["a green bench?", "a blue bowl?", "the top?"]
    assert len(questions_of(str(number) for number in range(20))) == 8


@needs_prompts
def test_without_spacy_the_script_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_in(SHARED)
    assert len(prompts) == len(set(prompts)) > 2300
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(SystemExit, match=r"spaCy is not installed(.|\n)*en_core_web_sm-3.5.0"):
        make_questions([str(SHARED)])
