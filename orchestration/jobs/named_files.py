"""The local files that a configuration names and that travel with a job: prompts, scorers' modules, small adapters."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from orchestration.config import RunConfig
from pipelines.dataset.adapter_files import find_adapter
from pipelines.dataset.errors import ConfigError

OURS = ("orchestration", "pipelines", "training")
"""Packages of the image; a folder of that name in a working directory is never sent for them."""

MAX_ADAPTER_BYTES = 33_554_432
"""Largest file of adapters that travels with a job."""


def named_files(config: RunConfig) -> list[Path]:
    """Return the local files and folders that the configuration names, each once.

    Raises:
        ConfigError: The file of prompts does not exist.
    """
    found = [*_prompts(config), *_modules(config), *_adapters(config)]
    return list(dict.fromkeys(path.resolve() for path in found))


def job_overrides(config: RunConfig) -> list[str]:
    """Return the overrides by which the job finds these files in its working directory."""
    overrides = [f"train.lora.weights={json.dumps(file.name, ensure_ascii=False)}" for file in _adapters(config)]
    prompts = config.evaluate.prompts
    if prompts is not None and _is_local(prompts.path):
        sent = prompts.model_copy(update={"path": _path(prompts.path).name})
        overrides.append(f"evaluate.prompts={json.dumps(sent.model_dump(mode='json'), ensure_ascii=False)}")
    return overrides


def _is_local(path: str) -> bool:
    return "://" not in path.removeprefix("file://")


def _path(path: str) -> Path:
    return Path(path.removeprefix("file://")).expanduser()


def _prompts(config: RunConfig) -> Iterator[Path]:
    prompts = config.evaluate.prompts
    if prompts is None or not _is_local(prompts.path):
        return
    if not _path(prompts.path).is_file():
        raise ConfigError(
            f"evaluate.prompts: there is no file {_path(prompts.path).absolute()}",
            "give a .txt, .jsonl, .csv, .tsv or .parquet file",
        )
    yield _path(prompts.path)


def has_sent_adapters(config: RunConfig) -> bool:
    """Return whether the adapters that training starts from travel with a job: local ones, unless they are large."""
    return any(True for _ in _adapters(config))


def _adapters(config: RunConfig) -> Iterator[Path]:
    """Yield the file of the adapters that training starts from, if it travels; a large one is found by its path."""
    lora = None if config.train is None else config.train.lora
    if lora is None or lora.weights is None or not _is_local(lora.weights) or not _path(lora.weights).exists():
        return
    file = find_adapter(lora.weights)
    if file.stat().st_size <= MAX_ADAPTER_BYTES:
        yield file


def _modules(config: RunConfig) -> Iterator[Path]:
    """Yield the modules of scorers that lie in the working directory; installed ones are the image's."""
    for entry in config.evaluate.scorer_entries:
        name, separator, _ = entry.name.partition(":")
        top = name.partition(".")[0]
        if not separator or not top.isidentifier():
            continue
        places = [place for place in (Path(top), Path(f"{top}.py")) if place.exists()]
        if places and _is_here(top, places[0]):
            yield places[0]


def _is_here(top: str, place: Path) -> bool:
    """Return whether a module would be imported from the working directory, not from an installed package."""
    spec = None if top in OURS else importlib.util.find_spec(top)
    if spec is None:
        return top not in OURS
    places = [Path(origin).resolve() for origin in (spec.origin, *(spec.submodule_search_locations or ())) if origin]
    return any(place.resolve() in (each, each.parent) for each in places)
