"""Names in the documentation: what a code span says it is, and whether that exists.

Paths, modules, commands, options, configuration keys and plain words are told apart by their form. A plain word must
occur in the code, as an identifier or inside a string; what belongs to other software is listed in FOREIGN.
"""

import ast
import functools
import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import generate as reference
from pydantic import BaseModel

from orchestration.cli import COMMANDS, GROUPS
from orchestration.config import RunConfig
from pipelines.dataset import errors

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipelines", "training", "orchestration")
FOLDERS = (*PACKAGES, "tests", "docs", "benchmarks", "infra")
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
WORD = re.compile(r"[A-Za-z_]\w*")
FILE = re.compile(r"\w[\w.*-]*\.(?:py|md|toml|txt|ya?ml|j2|css|js|png|jpg)(?::\d[\d,:-]*)?")
KEY = re.compile(r"([a-z_]\w*(?:\[\])?(?:\.\w+)*)(?:: | ?= ?|$)(.*)")
FOREIGN_OPTIONS = frozenset(
    {"--build-arg", "--learning_rate", "--loss_type", "--no_hflip", "--resources", "--scale_lr", "--seed", "--sft"}
)
"""Options of docker, of `ray start`, and of the released scripts."""
_FOREIGN_WORDS = """
AWS_SESSION_TOKEN HTTPS_PROXY MLFLOW_TRACKING_TOKEN NO_PROXY RAY_USE_TLS WANDB_API_KEY WANDB_BASE_URL WANDB_ENTITY
WANDB_MODE IPC_LOCK ValueError restricted finally string_view ext q4 m_c m_r ref_c ref_r clip_skip
trust_remote_code set_attention_backend get_scheduler force_zeros_for_empty_prompt timestep_spacing
fsdp_in_use safeguard_warmup slice_p
latest get_local_fp32_param set_local_hp_param
train.py utils.py train_diffusion_orpo_sdxl_lora.py train_diffusion_orpo_sdxl_lora_wds.py
jpg_0.jpg jpg_1.jpg label_0.txt label_1.txt caption.txt
"""
FOREIGN = frozenset(_FOREIGN_WORDS.split())
"""Names of other software and of its files, symbols of formulas: everything else in a code span is ours."""
HELP = ("-h", "--help")
PLACEHOLDERS = ("mapo COMMAND --help", "-o key.path=value")
WRONG_ON_PURPOSE = ("mapo run photos.yaml -o train.learning_rat=1e-6",)
"""What docs/reference/errors.md shows an error of."""
STORED = re.compile(r"(?:runs|dataset)/[\w<>*./-]+")
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """The code spans of a page's prose, each once."""
    return list(dict.fromkeys(SPAN.findall(FENCE.sub("", text))))


def command_lines(text: str) -> Iterator[str]:
    """The lines of a page's code blocks that call `mapo` or `make`, joined where they go on."""
    for block in FENCE.findall(text):
        for line in re.sub(r" *\\\n *", " ", block).splitlines():
            start = re.search(r"(?:^|\$ |&& |-- )((?:mapo|make) [a-z].*)", line.partition(" #")[0])
            if start and start.group(1) not in WRONG_ON_PURPOSE:
                yield start.group(1).partition(" | ")[0]


def missing_imports(text: str) -> Iterator[str]:
    """Names that a page's Python blocks import from the three packages and that do not exist."""
    for block in PYTHON.findall(text):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name for name in names if not _dotted_exists(name))


def problem_of_command(line: str) -> str | None:
    """Why a line that calls `mapo` or `make` could not be typed, if so; placeholders stand for any value."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        return str(error)
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        return None if set(words[1:]) <= targets else "no such target"
    two, one = " ".join(words[1:3]), words[1]
    named = [command for command in COMMANDS if command.name in (one, two)]
    if words[1:] == ["--version"]:
        return None
    if not named and two not in GROUPS:
        return f"no such command: {two}"
    options = {option.name for command in named for option in command.arguments}
    rest = words[2:]
    for place, word in enumerate(rest):
        if word.startswith("-") and word.partition("=")[0] not in {*options, *HELP}:
            return f"no such option: {word}"
        if word == "-o" and place + 1 < len(rest) and (problem := problem_of_key(rest[place + 1])):
            return problem
    return None


def problem_of_key(text: str) -> str | None:
    """Why `section.key`, or that with a value, is no key of the configuration."""
    found = KEY.fullmatch(text)
    if not found:
        return "not a key"
    model: Any = RunConfig
    for part in found.group(1).split("."):
        if part.isdigit():
            continue
        if model is None:
            return f"{part} is below something that has no keys"
        if part not in model.model_fields:
            return f"no such key: {part}"
        annotation = model.model_fields[part].annotation
        model = reference._model_in(annotation)
    return None


def kind_of(span: str) -> str | None:
    """What a code span is by its form; None for what is no name, such as a formula or a sentence."""
    head = re.split(r"[/.:]", span)[0]
    forms = (
        ("placeholder", span in PLACEHOLDERS),
        ("command", span.startswith(("mapo ", "make ", "-o "))),
        ("option", re.match(r"--[a-z]", span)),
        ("stored", STORED.fullmatch(span)),
        ("path", re.fullmatch(r"[\w.*-]+/[^ <>]*", span) and head in FOLDERS),
        ("file", FILE.fullmatch(span)),
        ("name", head in PACKAGES and re.fullmatch(r"[\w.]+", span)),
        ("error", re.match(r"[A-Z]\w+Error\b", span)),
        ("key", head in RunConfig.model_fields and re.fullmatch(r"[a-z]\w*(\[\])?\.[a-z_][\w.]*(: .*|=.*)?", span)),
        ("setting", re.fullmatch(r"[a-z]\w*: \S.*", span)),
        ("metric", span.startswith("ray_mapo_")),
        ("word", WORD.fullmatch(span)),
    )
    return next((kind for kind, is_it in forms if is_it), None)


def is_sound(span: str) -> bool:
    """Tell whether what a code span names exists."""
    kind, head = kind_of(span), re.split(r"[/.:]", span)[0]
    if span in FOREIGN or head in FOREIGN or kind in (None, "placeholder"):
        return True
    if kind == "command":
        return problem_of_command(f"mapo run c.yaml {span}" if span.startswith("-o ") else span) is None
    checks: dict[str, Callable[[], bool]] = {
        "option": lambda: re.split(r"[ =]", span)[0] in _options() | FOREIGN_OPTIONS,
        "stored": lambda: all(word in words() for word in WORD.findall(re.sub(r"<\w+>|\bN+\b", "", span))),
        "path": lambda: path_exists(re.sub(r":[\d,-]+$", "", span)),
        "name": lambda: _dotted_exists(span),
        "file": lambda: any(file.match(span.partition(":")[0]) for file in _files()) or span in words(),
        "error": lambda: hasattr(errors, re.split(r"\W", span)[0]),
        "key": lambda: problem_of_key(span) is None,
        "setting": lambda: head in keys(),
        "metric": lambda: any(name in words() for name in (span[4:], span[4:].removesuffix("_total"))),
        "word": lambda: span in words() or re.sub(r"_[01]$", "", span) in words(),
    }
    return checks[str(kind)]()


def path_exists(path: str) -> bool:
    """Whether a path of the repository, or a pattern, exists."""
    return any(ROOT.glob(path.rstrip("/"))) if "*" in path else (ROOT / path).exists()


@functools.cache
def keys() -> frozenset[str]:
    """Every key of the configuration, without its sections."""

    def of(model: type[BaseModel]) -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield name
            if inner := reference._model_in(field.annotation):
                yield from of(inner)

    return frozenset(of(RunConfig))


@functools.cache
def words() -> frozenset[str]:
    """Every word of the code: identifiers, and words inside strings; comments and docstrings are left out."""
    found: set[str] = set(keys())
    for file in _files():
        if file.suffix == ".py" and file.parts[0] in PACKAGES:
            found |= set(_words_of(ast.parse((ROOT / file).read_text())))
        elif file.suffix in {".j2", ".yaml", ".toml", ".js"} or file.name == "Makefile":
            found |= set(WORD.findall((ROOT / file).read_text()))
    return frozenset(found)


def _words_of(tree: ast.Module) -> Iterator[str]:
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield from WORD.findall(node.value)
        for name in ("id", "attr", "arg", "name"):
            if isinstance(value := getattr(node, name, None), str):
                yield from WORD.findall(value)


@functools.cache
def _files() -> tuple[Path, ...]:
    inside = (file for folder in FOLDERS for file in (ROOT / folder).rglob("*"))
    found = (file.relative_to(ROOT) for file in (*ROOT.glob("*"), *inside) if file.is_file())
    return tuple(file for file in found if "__pycache__" not in file.parts)


@functools.cache
def _options() -> frozenset[str]:
    return frozenset(option.name for command in COMMANDS for option in command.arguments) | {*HELP}


def _dotted_exists(name: str) -> bool:
    parts = name.split(".")
    thing: Any = importlib.import_module(parts[0])
    for place, part in enumerate(parts[1:], 2):
        if not hasattr(thing, part):
            try:
                importlib.import_module(".".join(parts[:place]))
            except ModuleNotFoundError:
                return False
        thing = getattr(thing, part)
    return True
