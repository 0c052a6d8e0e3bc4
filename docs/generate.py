"""Generate the pages of docs that follow from the code: configuration keys, commands, and the map of the modules.

`python docs/generate.py` rewrites them; tests/test_docs.py fails while they are stale.
"""

import ast
import inspect
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from orchestration.cli import COMMANDS
from orchestration.commands.options import Command, Option
from orchestration.config import RunConfig
from pipelines.sources.kind import Field
from pipelines.sources.registry import KINDS
from pipelines.suites.benchmarks import BENCHMARKS, FAMILIES, GROUPS
from pipelines.suites.catalogue import ListedSuite, list_suites
from training import losses
from training.methods import METHODS
from training.optimizers.registry import OPTIMIZERS
from training.tracking.backends import BACKENDS

ROOT = Path(__file__).parents[1]
FOLDER, CONCEPTS = ROOT / "docs" / "reference", ROOT / "docs" / "concepts"
FLOORS = ("orchestration", "training", "pipelines")
ARCHITECTURE_HEAD = """# Architecture

Three floors; inside a floor, rooms (folders) with one job each. `orchestration` uses `training` and `pipelines`;
`training` uses nothing of `pipelines` but `pipelines.dataset`, the contract between the floors; nothing looks up.
import-linter checks the floors and the layers of the rooms (`make lint`).
"""
BOUNDS: dict[type, tuple[str, str]] = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}
NAMES = {Any: "value", str: "text", int: "whole number", float: "number", bool: "true or false", types.NoneType: "null"}
SUITES_HEAD = """# Suites

Protocols of public benchmarks, pinned under a version: prompts by digest, images of each, sampling and judges. mapo
ships none of their prompts; `mapo suites fetch NAME` brings them from their public place or from a folder, checks them
against the digest, and `--to STORAGE` serves them to drivers on a cluster. Numbers of one version of a suite can be
compared. Those of papers cannot: for the same SDXL, published PickScores differ by more than any method gains, because
sampling differs. Draw the base, DPO and your own model in one table.

The digest is that of the parsed rows as JSON lines, so every layout in which a set is published gives the same one.
"""

CONFIGURATION_HEAD = """# Configuration

One YAML file describes a run. Unknown keys are errors, and so are values out of range; nothing is ignored. The resolved
configuration, with every default, is kept at `runs/<name>/config.json` on the storage.

`-o key.path=value` overrides a key from the command line, any number of times. The value is read as YAML; a number in
the path is a place in a list, counted from 0:

```
mapo run photos.yaml -o train.max_steps=100 -o ingest.sources.0.path=/data/more/*.parquet
```

Which sections a command needs: `ingest` needs `ingest`; `encode` and `evaluate` need `encode`; `train` needs `encode`
and `train`; `export` needs `encode` and `train`; `run` needs all three. `export` and `evaluate` have defaults for
everything.

A configuration *only judges* if it has neither `ingest` nor `train`, and `evaluate.models` names neither `aligned` nor
`checkpoints`. As `aligned` is there by default, such a configuration has to name its models. Its `run` has the stages
`evaluate` and `report` and needs `encode` alone, for the base model.

Local paths may be relative to the folder in which the command runs, and may begin with `~`; `config.json` has them
absolute. `mapo submit` makes them absolute before it sends a job, which runs in a folder of its own; with plain
`ray job submit` [give absolute paths or URLs](../guides/jobs.md#plain-ray-job-submit).
"""

COMMANDS_HEAD = """# Commands

`mapo` is the console script; `python -m mapo_entry` is the same, and so is `python -m orchestration` where no other
`orchestration` is in the way. `mapo --version` prints the version.

Exit codes: 0 done, 1 the job failed, 2 the command or the configuration is wrong, 130 stopped. An error is one
message with a `hint:`; `--debug`, after the command, adds the traceback. [Errors](errors.md) lists them all.

`mapo run`, with `--dry-run` or not, `mapo status`, `mapo report` and `mapo submit` take all stages of a configuration:
six, or `evaluate` and `report` if it [only judges](configuration.md).
"""

COMMANDS_TAIL = """## Environment

| variable | effect |
|---|---|
| `RAY_API_SERVER_ADDRESS` | Where `mapo submit` and `mapo logs` find Ray's dashboard without `--address`; then `RAY_ADDRESS`. |
| `RAY_AUTH_MODE`, `RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH`, `RAY_JOB_HEADERS` | What lets a client in; see [Jobs](../guides/jobs.md#what-lets-a-client-in). |
| `RAY_ADDRESS` | The Ray cluster to connect to. Without it a command starts a Ray of its own on this machine, and stops it at the end. |
| `MAPO_STORAGE_PATIENCE_S` | Seconds for which a run waits for an object store that does not answer; default 300 during a run, 0 otherwise. |
| `MAPO_CACHE` | The node's folder for models fetched from a URL and weights of scorers; default `~/.cache/mapo`. |
| `HF_HOME`, `HF_HUB_OFFLINE`, `HF_TOKEN` | Read by the hub's client, for models named by a hub id. |
| `AWS_*`, `GOOGLE_APPLICATION_CREDENTIALS` | Credentials of an object store; see [On a cluster](../guides/cluster.md#object-storage). |
| `TORCH_EXTENSIONS_DIR` | Where what DeepSpeed compiles for `train.offload: nvme` is kept; default `~/.cache/torch_extensions`. |
"""  # noqa: E501


def configuration_page() -> str:
    """docs/reference/configuration.md."""
    parts = [_head("configuration_page"), CONFIGURATION_HEAD, *_section(RunConfig, "")]
    parts.append(
        "## Source formats\n\nWhat `ingest.sources[].format` may be; [how sources are read](../guides/sources.md).\n"
    )
    kinds = [(f"`{kind.format}`", _columns(kind.fields), kind.label) for kind in KINDS.values()]
    parts.append(_table(("format", "columns (other names in brackets; required in bold)", "label"), kinds))
    parts.append(
        "## Optimizers\n\nWhat `train.optimizer` may be; [how they compute](../concepts/training.md#optimizer).\n"
    )
    parts.append(_table(("optimizer", "what it is", "states", "`offload`", "default rate"), _optimizers()))
    parts.append("## Losses\n\nWhat `train.loss` may hold, by `train.method`; [the formulas](../concepts/losses.md).\n")
    rows = [(f"`{name}`", method.summary, _parameters(method.defaults)) for name, method in METHODS.items()]
    parts.append(_table(("method", "what it is", "parameters and defaults"), rows))
    return "\n".join(parts)


def _optimizers() -> list[tuple[str, ...]]:
    return [
        (
            f"`{name}`",
            info.summary + (f" (needs {info.package}: `pip install 'mapo[{info.extra}]'`)" if info.package else ""),
            f"{info.state_bytes:g} bytes per weight",
            ", ".join(f"`{each}`" for each in info.offloads),
            "the method's" if info.rate is None else f"{info.rate.value:g}, a factor of its estimate",
        )
        for name, info in OPTIMIZERS.items()
    ]


def commands_page() -> str:
    """docs/reference/commands.md."""
    parts = [_head("commands_page"), COMMANDS_HEAD]
    for command in COMMANDS:
        parts.append(f"## `mapo {command.name}`\n\n{command.summary}\n\n```\n{_usage(command)}\n```\n")
        rows = [(f"`{option.shown}`", _meaning(option)) for option in command.arguments]
        parts.append(_table(("argument", "meaning"), rows))
    return "\n".join([*parts, COMMANDS_TAIL])


def _usage(command: Command) -> str:
    return " ".join([f"mapo {command.name}", *(option.usage for option in command.arguments)])


def _meaning(option: Option) -> str:
    return f"{option.meaning}; may be given several times" if option.is_repeated else option.meaning


def _section(model: type[BaseModel], path: str) -> list[str]:
    """Return a heading, a table of the keys and the rules of one section, then the sections inside it."""
    title = f"## `{path}`" if path else "## Top level"
    rows, inner = [], []
    for name, field in model.model_fields.items():
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("hidden"):
            continue
        key = f"{path}.{name}" if path else name
        section = _model_in(field.annotation)
        if section is not None:
            inner += _section(section, f"{key}[]" if _is_list(field.annotation) else key)
        meaning = " ".join((field.description or "").split())
        rows.append((f"`{name}`", _type(field, section, key), _default(field, section), meaning))
    text = f"{title}\n\n{inspect.getdoc(model)}\n\n" + _table(("key", "type", "default", "meaning"), rows)
    if rules := _rules(model):
        text += "\nRules:\n\n" + "".join(f"- `{name}`: {rule}\n" for name, rule in rules)
    return [text, *inner]


def _rules(model: type[BaseModel]) -> list[tuple[str, str]]:
    """Return the validators of a section by name, with their docstrings."""
    found = model.__pydantic_decorators__
    of_fields = [(name, inspect.getdoc(each.func)) for name, each in found.field_validators.items()]
    of_models = [(name, inspect.getdoc(each.func)) for name, each in found.model_validators.items()]
    return [(name, rule or "") for name, rule in of_fields + of_models]


def _type(field: FieldInfo, section: type[BaseModel] | None, key: str) -> str:
    if section is not None:
        anchor = key.replace(".", "")  # as GitHub makes it from the heading
        link = f"list of [sections](#{anchor})" if _is_list(field.annotation) else f"[section](#{anchor})"
        if _is_list(field.annotation) and str in typing.get_args(typing.get_args(field.annotation)[0]):
            link = f"list of text or [sections](#{anchor})"
        return f"{link} or null" if _is_optional(field.annotation) else link
    bounds = []
    for limit in field.metadata:
        if type(limit) in BOUNDS:
            attribute, sign = BOUNDS[type(limit)]
            bounds.append(f"{sign} {getattr(limit, attribute):,}")
        elif isinstance(limit, MinLen):
            bounds.append("not empty")
    return ", ".join([_type_name(field.annotation), *bounds])


def _type_name(annotation: Any) -> str:
    """Name a type as a person says it: `text or null`, "list of text", `a`, `b` or `c`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        shown = [f"`{value}`" for value in arguments]
        return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"names with a {_type_name(arguments[1])} each"
    return NAMES[annotation]


def _default(field: FieldInfo, section: type[BaseModel] | None) -> str:
    if field.default_factory is not None:
        return "by other keys" if field.default_factory_takes_validated_data else "`{}`"
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel):
        return "its defaults"
    value: Any = field.default
    plain = {None: "null", True: "true", False: "false"}
    shown = plain[value] if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, tuple):
        shown = f"[{', '.join(str(each) for each in value)}]"
    return f"`{shown}`"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a key holds, perhaps in a list, perhaps beside text."""
    inside = typing.get_args(annotation)
    for candidate in (annotation, *inside, *(each for inner in inside for each in typing.get_args(inner))):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) is tuple


def _is_optional(annotation: Any) -> bool:
    return types.NoneType in typing.get_args(annotation)


def _parameters(values: typing.Mapping[str, float]) -> str:
    return ", ".join(f"`{name}` {value:g}" for name, value in values.items()) or "none"


def _columns(fields: Sequence[Field]) -> str:
    """Return the columns of a kind of source, the required ones in bold."""
    shown = []
    for field in fields:
        name = f"**`{field.name}`**" if field.required else f"`{field.name}`"
        shown.append(name + (f" ({', '.join(f'`{other}`' for other in field.also)})" if field.also else ""))
    return ", ".join(shown)


def losses_table() -> str:
    """Return the table of docs/concepts/losses.md."""
    rows = []
    for name, method in METHODS.items():
        noted = [
            f"`{key}` {parameter.default:g}" + (f" ({parameter.note})" if parameter.note else "")
            for key, parameter in method.parameters.items()
        ]
        paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else "none"
        reference = "yes" if method.needs_reference else "no"
        rows.append((f"`{name}`", f"`{method.formula}`", "; ".join(noted) or "none", reference, paper))
    return _table(("`train.method`", "loss of a pair", "parameters", "reference", "paper on arXiv"), rows)


def losses_of_python() -> str:
    """Return the losses of docs/reference/python.md: each function as it is called, and what it is."""
    rows = []
    for name, method in METHODS.items():
        found = inspect.signature(getattr(losses, f"{name}_loss")).parameters.values()
        free = [each.name for each in found if each.kind is not each.KEYWORD_ONLY]
        named = [each.name for each in found if each.kind is each.KEYWORD_ONLY]
        called = ", ".join([*free, *(["*"] if named else []), *named])
        rows.append((f"`{name}_loss({called})`", method.summary))
    return _table(("name", "returns, for each pair"), rows)


def trackers_table() -> str:
    """Return the table of docs/concepts/metrics.md."""
    rows = [
        (
            f"`{name}`",
            f"`pip install 'mapo[{backend.extra}]'`" if backend.extra else "included",
            backend.resumes,
            backend.variables,
        )
        for name, backend in BACKENDS.items()
    ]
    return _table(("tracker", "installation", "a resumed run", "environment variables"), rows)


def with_blocks(file: Path, **blocks: str) -> str:
    """Return a page with its generated blocks as they should be.

    Args:
        file: The page, written by hand around lines `<!-- NAME: ... -->` and `<!-- end of NAME -->`.
        blocks: The text between those lines, by name.
    """
    text = file.read_text()
    for name, block in blocks.items():
        begin, end = f"<!-- {name}: written by docs/generate.py -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        assert found, f"{file} has no block {name}"
        text = f"{before}{begin}\n{block}\n{end}{after}"
    return text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def _head(function: str) -> str:
    return f"<!-- Written by `python docs/generate.py` ({function}); do not edit. -->\n"


def suites_page() -> str:
    """docs/reference/suites.md."""
    hidden = {name for family in FAMILIES for name in GROUPS[family][1:]}
    shown = [each for each in BENCHMARKS if each.label not in hidden]
    parts = [_head("suites_page"), SUITES_HEAD]
    rows = [(f"`{each.name}`", f"{each.num_prompts:,}", _images(each), _names(each.judges)) for each in list_suites()]
    parts.append(_table(("suite", "prompts", "images of each", "judges"), rows))
    for each in list_suites([each.label for each in shown]):
        family = next((family for family in FAMILIES if each.name in GROUPS[family]), None)
        parts.append(_suite(each, family))
    return "\n".join(parts)


def _suite(suite: ListedSuite, family: str | None) -> str:
    head = f"## `{suite.name}`\n\n{suite.about}\n"
    if family is not None:
        others = _names(GROUPS[family])
        head = f"## `{family}`\n\nIts suites: {others}. The first of them:\n\n{suite.about}\n"
    sampling = f"{suite.num_inference_steps} steps, guidance {suite.guidance_scale:g}, {suite.resolution} pixels"
    rows = [
        ("prompts", f"{suite.num_prompts:,}; images of each: {suite.images_per_prompt}"),
        ("sampling", sampling),
        ("judges", _names(suite.scorers) or "foreign: `mapo scores import`"),
        ("source", f"{suite.source} ({suite.licence})"),
        ("digest", f"`{suite.sha256}`" if suite.sha256 else "not pinned: the number of rows is checked"),
    ]
    told = "\n".join(f"- {each}" for each in suite.differs)
    judged = "" if family is None else _members(list_suites(GROUPS[family]))
    return f"{head}\n{_table(('', ''), rows)}\nHow it differs from what its authors publish:\n\n{told}\n{judged}"


def _members(suites: Sequence[ListedSuite]) -> str:
    """Return the judges of the suites of a family, and what only some of them differ in; nothing if all are alike."""
    if len({each.judges for each in suites}) == 1:
        return ""
    rows = [(f"`{each.name}`", _names(each.scorers), _names(each.foreign), _names(each.derived)) for each in suites]
    common = set.intersection(*(set(each.differs) for each in suites))
    told = "\n".join(f"- `{each.name}`: {text}" for each in suites for text in each.differs if text not in common)
    return f"\n{_table(('suite', 'judges', 'imported', 'merged'), rows)}\n{told}\n"


def _images(suite: ListedSuite) -> str:
    return "" if suite.images_per_prompt is None else str(suite.images_per_prompt)


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def architecture_page() -> str:
    """Return the map of floors, rooms and modules, from their docstrings."""
    lines = [_head("architecture_page"), ARCHITECTURE_HEAD]
    for floor in FLOORS:
        rooms = sorted(file.parent for file in (ROOT / floor).rglob("__init__.py"))
        for room in rooms:
            depth = "##" if room == ROOT / floor else "###"
            summary, _, rest = _docstring(room / "__init__.py").partition("\n\n")
            lines.append(
                f"\n{depth} `{room.relative_to(ROOT)}/`\n\n{summary}\n" + (f"\n{rest}\n" if rest else "") + "\n"
            )
            modules = sorted(file for file in room.glob("*.py") if not file.name.startswith("__"))
            lines += [f"- `{file.name}`: {_docstring(file).partition(chr(10) * 2)[0]}\n" for file in modules]
    return "".join(lines)


def _docstring(file: Path) -> str:
    """Return a module's docstring; fail for a module without one."""
    found = ast.get_docstring(ast.parse(file.read_text()))
    assert found, f"{file} has no docstring"
    return found.strip()


def pages() -> dict[Path, str]:
    """Every generated page with its text."""
    return {
        FOLDER / "configuration.md": configuration_page(),
        FOLDER / "commands.md": commands_page(),
        FOLDER / "suites.md": suites_page(),
        FOLDER / "python.md": with_blocks(FOLDER / "python.md", losses=losses_of_python()),
        CONCEPTS / "losses.md": with_blocks(CONCEPTS / "losses.md", losses=losses_table()),
        CONCEPTS / "metrics.md": with_blocks(CONCEPTS / "metrics.md", trackers=trackers_table()),
        CONCEPTS / "architecture.md": architecture_page(),
    }


def main() -> None:
    """Rewrite the pages that changed."""
    for file, text in pages().items():
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
            sys.stdout.write(f"{file}\n")


if __name__ == "__main__":
    main()
