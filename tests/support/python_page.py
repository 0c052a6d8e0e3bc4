"""docs/reference/python.md against the code: every name in it is imported, every signature compared."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pipelines.dataset.errors as errors

SPAN = re.compile(r"`([^`\n]+)`")
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
ENTRY = re.compile(r"^\| `([A-Za-z_][\w.]*)(?:\((.*?)\))?` \|", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
ELSEWHERE = frozenset({"ValueError"})
"""Names on the page that Python itself has."""


def entries(text: str) -> list[tuple[str, str, str | None]]:
    """Every name that the page's tables list: its section's modules, the name, the text between its parentheses."""
    return [
        (heading, name, called if f"{name}({called})" in body else None)
        for heading, body in _sections(text)
        for name, called in ENTRY.findall(body)
    ]


def problems(text: str) -> list[str]:
    """What on the page is not so: names that do not exist, signatures that differ, other code spans unknown here."""
    found = []
    for heading, body in _sections(text):
        modules = [importlib.import_module(name) for name in SPAN.findall(heading)]
        if not modules:
            found.append(f"{heading}: a section without a module")
            continue
        known: set[str] = set(ELSEWHERE)
        for name, called in ENTRY.findall(body):
            thing = _resolve(modules, name)
            if thing is None:
                found.append(f"{heading}: {name} does not exist")
                continue
            known |= _words_of(thing)
            if f"{name}({called})" in body and (actual := signature(thing)) != called:
                found.append(f"{heading}: {name}({called}) is {name}({actual})")
        if not ENTRY.search(body):
            found.append(f"{heading}: lists no name")
        listed = {span for entry in ENTRY.finditer(body) for span in SPAN.findall(entry.group())}
        found += [
            f"{heading}: `{span}` is unknown"
            for span in set(SPAN.findall(FENCE.sub("", body))) - listed
            if not _is_known(span, modules, known)
        ]
    return found


def signature(thing: Any) -> str:
    """Return the parameters of a function or class as the page writes them: without types, without `self`."""
    shown, is_keyword = [], False
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not is_keyword:
            shown.append("*")
            is_keyword = True
        default = parameter.default
        value = f'"{default}"' if isinstance(default, str) else repr(default)
        shown.append(parameter.name if default is parameter.empty else f"{parameter.name}={value}")
    return ", ".join(shown)


def _sections(text: str) -> Iterator[tuple[str, str]]:
    parts = HEADING.split(text)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def _resolve(modules: list[ModuleType], name: str) -> Any:
    for module in modules:
        thing: Any = module
        for part in name.split("."):
            if isinstance(thing, ModuleType) and not hasattr(thing, part):
                try:
                    importlib.import_module(f"{thing.__name__}.{part}")
                except ModuleNotFoundError:
                    thing = None
                    break
            thing = getattr(thing, part, None)
        if thing is not None:
            return thing
    return None


def _words_of(thing: Any) -> set[str]:
    """What may be said of a listed name: its own, its parameters', those of a class's fields and methods."""
    words = {thing.__name__} if hasattr(thing, "__name__") else set()
    if callable(thing):
        words |= set(inspect.signature(thing).parameters)
    if isinstance(thing, type):
        words |= set(dir(thing)) | set(inspect.get_annotations(thing))
        words |= set(re.findall(r"self\.([a-z]\w*)\b[^=\n]*= ", inspect.getsource(thing)))
    return words


def _is_known(span: str, modules: list[ModuleType], known: set[str]) -> bool:
    if span in known or hasattr(errors, span):
        return True
    if span.startswith(("mapo ", "--")):
        return True  # held to the command line by the test of every page's commands
    if "." in span and _resolve([importlib.import_module(span.partition(".")[0])], span.partition(".")[2]):
        return True
    return any(span in _strings_of(module) for module in modules)


def _strings_of(module: ModuleType) -> set[str]:
    tree = ast.parse(inspect.getsource(module))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)} | {
        word for name in ("METHODS",) for word in getattr(importlib.import_module("training.methods"), name)
    }
