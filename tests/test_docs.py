"""The documentation against the code: nothing stale, nothing left out, no link that leads nowhere."""

import contextlib
import dataclasses
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import doc_names
import generate as reference
import pytest
import python_page
import yaml
from PIL import Image

from orchestration.cli import COMMANDS, parser
from orchestration.commands.options import Command
from orchestration.config import RunConfig, parse_config
from orchestration.demo.run import CONFIG
from pipelines.dataset.errors import ConfigError, JobError, MapoError
from pipelines.dataset.layout import LATENTS_SCHEMA, TEXT_SCHEMA
from pipelines.dataset.pair import PAIRS_SCHEMA, Reason
from pipelines.dataset.storage import Storage
from pipelines.suites.results import Comparison, ModelScore, SuiteResult
from training.methods import METHODS

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
DOCS = ROOT / "docs"
PAGES = [README, CONTRIBUTING, ROOT / "CHANGELOG.md", ROOT / "infra" / "README.md", *sorted(DOCS.rglob("*.md"))]
PYTHON = DOCS / "reference" / "python.md"
OF_TODAY = [page for page in PAGES if page != DOCS / "log.md"]
"""Pages about what is; the lab book says what was tried, under the names of its day."""
PACKAGES = ("pipelines", "training", "orchestration")

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
REQUIRED = ("name: needed", "storage: somewhere")


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes from a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: Path, language: str) -> list[str]:
    """The insides of a page's code blocks of one language."""
    found = (block.partition("\n") for block in FENCE.findall(page.read_text()))
    return [rest.removesuffix("```") for head, _, rest in found if head == f"```{language}"]


def listed_files() -> Iterator[str]:
    """The paths of the tree in the README, from its indentation; folders end with '/'."""
    (tree,) = (block for block in blocks(README, "") if block.startswith("pipelines/"))
    floor = ""
    for line in tree.splitlines():
        names, _, phrase = line.strip().partition("  ")
        assert phrase.strip(), f"{names} has no phrase"
        floor = floor if line.startswith(" ") else ""
        for name in names.split():
            yield floor + name
        floor = floor or names


@pytest.mark.parametrize("page", reference.pages(), ids=lambda page: page.name)
def test_generated_pages_are_current(page: Path) -> None:
    assert page.read_text() == reference.pages()[page], "stale: run `python docs/generate.py`"


def test_every_command_is_documented_and_has_help() -> None:
    text = (DOCS / "reference" / "commands.md").read_text()
    assert len(COMMANDS) >= 10
    for command in COMMANDS:
        assert f"\n## `mapo {command.name}`\n" in text
        assert command.help
        for option in command.arguments:
            assert option.help, f"{command.name} {option.name} has no help"
            assert option.shown in text


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_reference_of_a_command_is_what_argparse_says(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """No option is hidden, and none is described that does not exist."""
    monkeypatch.setenv("COLUMNS", "1000")  # no line is broken
    with pytest.raises(SystemExit) as left, contextlib.redirect_stdout(io.StringIO()) as out:
        parser().parse_args([*command.name.split(), "--help"])
    assert left.value.code == 0
    told = " ".join(out.getvalue().split())
    assert command.summary in told
    for option in command.arguments:
        assert option.meaning in told
    listed = re.findall(r"^  (-[-\w]+|[A-Z]+)\b", out.getvalue(), re.MULTILINE)
    assert sorted(listed) == sorted(["-h", *(option.name for option in command.arguments)])


def test_every_command_is_in_the_readme() -> None:
    spans = doc_names.spans(README.read_text())
    for name in (f"mapo {command.name}" for command in COMMANDS):
        assert any(span == name or span.startswith(f"{name} ") for span in spans), name


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len(README.read_text().splitlines()) < 130
    (tree,) = (block for block in blocks(README, "") if block.startswith("pipelines/"))
    assert len(tree.splitlines()) <= 20


def test_every_key_has_a_meaning() -> None:
    text = reference.configuration_page()
    assert not re.search(r"\|\s*\|\n", text)
    for name in (*RunConfig.model_fields, *METHODS):
        assert f"`{name}`" in text


def test_every_reason_is_explained_once() -> None:
    text = (DOCS / "reference" / "reasons.md").read_text()
    found = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert set(found) == {str(reason) for reason in Reason}
    twice = {reason for reason in found if found.count(reason) > 1}
    assert twice == {"truncated_image"}  # ingest and encode can both find it


def test_every_column_of_every_table_is_explained() -> None:
    text = (DOCS / "reference" / "storage.md").read_text()
    for schema in (PAIRS_SCHEMA, LATENTS_SCHEMA, TEXT_SCHEMA):
        for column in schema.names:
            assert f"`{column}`" in text, column


def test_every_error_is_listed_with_its_exit_code() -> None:
    text = (DOCS / "reference" / "errors.md").read_text()
    listed = dict(re.findall(r"^\| `(\w+)` \|.*\| (\d) \|$", text, re.MULTILINE))
    classes: list[type[MapoError]] = [ConfigError, JobError, *JobError.__subclasses__()]
    assert listed == {each.__name__: str(each.exit_code) for each in classes}
    assert set(MapoError.__subclasses__()) == {ConfigError, JobError}


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{title(page)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{title(page)}: {link}"


def test_every_page_is_reached_from_the_index() -> None:
    index = DOCS / "index.md"
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in LINK.findall(index.read_text())}
    assert {page for page in DOCS.rglob("*.md") if page != index} == {page for page in linked if DOCS in page.parents}


def test_the_tree_of_the_readme_is_the_tree() -> None:
    listed = list(listed_files())
    assert not [path for path in listed if not (ROOT / path).is_dir()]
    rooms = {
        f"{file.parent.relative_to(ROOT)}/" for package in PACKAGES for file in (ROOT / package).glob("*/__init__.py")
    }
    assert rooms <= set(listed)


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_configuration_in_the_docs_is_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        parse_config(block)


def test_the_readme_has_a_configuration_of_five_lines() -> None:
    (block,) = blocks(README, "yaml")
    assert len(block.splitlines()) == 5
    assert set(yaml.safe_load(block)) == {"name", "storage", "ingest", "encode", "train"}


def test_the_demo_is_described_as_it_is_configured() -> None:
    train = yaml.safe_load(CONFIG.read_text())["train"]
    text = " ".join((DOCS / "guides" / "demo.md").read_text().split())
    assert f"`{train['method']}` with β {train['loss']['beta']}" in text
    assert f"{train['max_steps']} steps of {train['global_batch_size']} pairs" in text
    assert f"last checkpoint, {train['checkpoint_every']} steps apart" in text


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_nothing_is_left_to_do(page: Path) -> None:
    assert "TODO" not in page.read_text()


@pytest.mark.parametrize("page", OF_TODAY, ids=title)
def test_every_name_in_code_type_exists(page: Path) -> None:
    """Paths, modules, commands, options, keys, and every single word, which must be in the code or known as foreign."""
    text = page.read_text()
    made_here = set(re.findall(r"\w+", "".join(FENCE.findall(text)))) if page == CONTRIBUTING else set()
    assert [span for span in doc_names.spans(text) if not doc_names.is_sound(span) and span not in made_here] == []


@pytest.mark.parametrize("page", OF_TODAY, ids=title)
def test_every_command_and_import_in_code_blocks_exists(page: Path) -> None:
    text = page.read_text()
    wrong = {line: doc_names.problem_of_command(line) for line in doc_names.command_lines(text)}
    assert {line: problem for line, problem in wrong.items() if problem} == {}
    assert list(doc_names.missing_imports(text)) == []


def test_names_of_every_kind_are_looked_at() -> None:
    spans = [span for page in OF_TODAY for span in doc_names.spans(page.read_text())]
    kinds = Counter(doc_names.kind_of(span) for span in spans)
    least = {"command": 50, "error": 10, "file": 100, "key": 50, "metric": 10, "name": 10, "option": 50, "path": 20}
    least |= {"setting": 30, "stored": 15, "word": 500}
    assert {kind: kinds[kind] for kind, count in least.items() if kinds[kind] < count} == {}
    assert sum(1 for page in OF_TODAY for _ in doc_names.command_lines(page.read_text())) >= 40


@pytest.mark.parametrize(
    "span",
    [
        "training/zero.py", "encode_plan.py", "pipelines.encode_plan", "pipelines.ingest.pending_units",
        "mapo data tidy", "mapo run CONFIG --never", "make coffee", "--never", "train.learning_rat",
        "-o train.learning_rat=1", "rats: 2", "NoSuchError", "runs/<name>/attic.json", "pending_unit",
        "ray_mapo_nothing",
    ],
)  # fmt: skip
def test_a_name_that_does_not_exist_is_found(span: str) -> None:
    assert not doc_names.is_sound(span)


def test_every_python_name_and_signature_is_as_documented() -> None:
    text = PYTHON.read_text()
    assert python_page.problems(text) == []
    listed = python_page.entries(text)
    assert len(listed) >= 60
    assert sum(called is not None for _, _, called in listed) >= 55
    assert {name for _, name, _ in listed} >= {f"{method}_loss" for method in METHODS}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("`pending_of(", "`pending_units("),
        ("`PairReader.read(records)`", "`PairReader.pair(record)`"),
        ('wanted="auto"', 'wanted="ema"'),
        ("*, beta, gamma", "beta, gamma"),
        ("its `folder`", "its `place`"),
        ("`training.data.order`", "`training.order`"),
    ],
)
def test_a_stale_entry_of_the_python_page_is_found(old: str, new: str) -> None:
    text = PYTHON.read_text()
    assert old in text
    try:
        assert python_page.problems(text.replace(old, new))
    except ModuleNotFoundError:
        assert new == "`training.order`"


def test_the_python_page_computes_losses_as_it_says() -> None:
    torch = pytest.importorskip("torch")
    names = {"prediction": torch.rand(4, 4, 8, 8, requires_grad=True), "target": torch.rand(4, 4, 8, 8)}
    for block in blocks(PYTHON, "python")[:2]:
        exec(compile(block, PYTHON.name, "exec"), names)
    assert names["prediction"].grad is not None


def test_the_python_page_compares_models_as_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    examples = [block for block in blocks(PYTHON, "python") if "pipelines.suites" in block]
    for block in examples:
        exec(compile(block, PYTHON.name, "exec"), {})
    sentence, rate, words = capsys.readouterr().out.splitlines()
    assert sentence.startswith("aligned is higher by 0.")
    assert rate == "1.0"
    assert words.startswith("aligned is higher by 0.")


def test_results_are_read_as_their_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example of a file is one, and the example of a program reads it; the tables name every field."""
    page = DOCS / "reference" / "results.md"
    (example,), (program,) = blocks(page, ""), blocks(page, "python")
    monkeypatch.chdir(tmp_path)
    Storage("runs/photos").write("runs/photos/evaluation/results.json", example.encode())
    exec(compile(program, page.name, "exec"), {})
    assert capsys.readouterr().out == "held-out, pickscore: aligned is higher by 0.39 (0.24 to 0.54)\n"
    text = page.read_text()
    for record in (SuiteResult, ModelScore, Comparison):
        for field in dataclasses.fields(record):
            assert f"`{field.name}`" in text, f"{record.__name__}.{field.name}"


def test_the_scorer_of_the_guide_scores() -> None:
    (block,) = blocks(DOCS / "guides" / "evaluate.md", "python")
    names: dict[str, Any] = {}
    exec(compile(block, "colour_scores.py", "exec"), names)
    grey, red = (Image.new("RGB", (8, 8), colour) for colour in ("grey", "red"))
    scorer = names["ColourfulnessScore"]()
    scorer.fit([red, grey], [grey, grey], ["a", "b"])
    assert scorer.score([red, grey], ["a", "b"]) == [1.0, 0.0]
