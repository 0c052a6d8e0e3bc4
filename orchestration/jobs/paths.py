"""The local paths of a configuration, made absolute for Ray jobs, which run in another folder."""

import copy
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestration.config import RunConfig, check_data, read_text, yaml_of
from orchestration.jobs.named_files import has_sent_adapters
from orchestration.run.context import Say
from orchestration.run.job_id import JOB_VARIABLE
from pipelines.dataset.adapter_files import is_hub_id
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.model_fetch import HUB_ID
from training.config import LoraConfig

NODE_LOCAL = ("train.cache_dir", "train.offload_path")
"""Folders on each node's own disk."""


def local_paths(config: RunConfig) -> dict[str, str]:
    """Return the path of every key that names a place on a file system, as written; URLs and hub ids are left out."""
    return {key: path for key, path in _places(config) if path is not None and "://" not in path}


def _places(config: RunConfig) -> Iterator[tuple[str, str | None]]:
    yield "storage", config.storage.removeprefix("file://")
    for number, source in enumerate(config.ingest.sources if config.ingest else ()):
        yield f"ingest.sources.{number}.path", source.path.removeprefix("file://")
        yield f"ingest.sources.{number}.images", source.images and source.images.removeprefix("file://")
    if config.encode:
        yield "encode.model", _model(config.encode.model)
        yield "encode.vae", _model(config.encode.vae)
    for number, entry in enumerate(config.evaluate.scorers):
        if not isinstance(entry, str):
            yield f"evaluate.scorers.{number}.weights", entry.weights
    for number, model in enumerate(config.evaluate.models):
        if not isinstance(model, str):
            yield f"evaluate.models.{number}.model", _model(model.model)
            yield f"evaluate.models.{number}.lora", model.lora
    if config.train:
        yield "train.lora.weights", _adapters(config.train.lora)
        yield "train.cache_dir", config.train.cache_dir
        yield "train.offload_path", config.train.offload_path


def _model(name: str | None) -> str | None:
    """Return a model that is a folder, None for a hub id; a folder of that name takes precedence, as in loading."""
    if name is None or (HUB_ID.fullmatch(name) and not Path(name).exists()):
        return None
    return name


def _adapters(lora: LoraConfig | None) -> str | None:
    """Return the place of the adapters that training starts from, None for a hub id."""
    weights = None if lora is None else lora.weights
    return None if weights is None or is_hub_id(weights) else weights.removeprefix("file://")


def is_relative(path: str) -> bool:
    """Return whether a path depends on the working directory."""
    return not Path(path).expanduser().is_absolute()


def absolute_path(path: str) -> str:
    """Return the absolute path, with links left as written."""
    return str(Path(os.path.abspath(Path(path).expanduser())))  # noqa: PTH100 (resolve() would follow links)


def absolute_overrides(config: RunConfig) -> list[str]:
    """Return `key=value` for every path that only this process understands: relative, or beginning with `~`."""
    paths = local_paths(config).items()
    return [f"{key}={yaml_text(absolute_path(path))}" for key, path in paths if absolute_path(path) != path]


def load_located(file: str | Path, overrides: Sequence[str]) -> tuple[RunConfig, tuple[str, ...]]:
    """Load a configuration with absolute paths, so that it is the same run in every folder and on every machine.

    Returns:
        The configuration, and the overrides that make it from the file.

    Raises:
        ConfigError: As `load_config`.
    """
    return locate(yaml_of(read_text(file), str(file)), overrides, source=str(file))


def locate(
    data: Any, overrides: Sequence[str], *, source: str, check: Callable[[RunConfig], None] = lambda config: None
) -> tuple[RunConfig, tuple[str, ...]]:
    """Check a configuration of plain data and make its paths absolute, like `load_located`.

    Args:
        data: The configuration.
        overrides: `key.path=value`.
        source: The configuration's name in errors.
        check: Called with the configuration while its paths are as written.
    """
    found = check_data(copy.deepcopy(data), overrides, source=source)
    check(found)
    every = (*overrides, *absolute_overrides(found))
    return check_data(data, every, source=source), every


def shared_paths(config: RunConfig) -> dict[str, str]:
    """Return the absolute local paths that every node must see."""
    found = {key: absolute_path(path) for key, path in local_paths(config).items() if key not in NODE_LOCAL}
    if has_sent_adapters(config):
        found.pop("train.lora.weights", None)
    return found


def yaml_text(text: str) -> str:
    """Return a text as YAML: plain if YAML reads it back unchanged, else in quotes."""
    try:
        if yaml.safe_load(text) == text:
            return text
    except yaml.YAMLError:
        pass
    return json.dumps(text, ensure_ascii=False)


def check_inside_job(config: RunConfig, say: Say) -> None:
    """Check the relative paths of a run inside a Ray job, whose working directory is a copy that is deleted later.

    Relative sources are in that copy on every node, but another job finds them at another path and reads them again.

    Raises:
        ConfigError: The storage would be in the copy, and be lost with it.
    """
    if not os.environ.get(JOB_VARIABLE):
        return
    relative = {key: path for key, path in local_paths(config).items() if is_relative(path)}
    if "storage" in relative:
        raise ConfigError(
            f"storage {relative['storage']} is a relative path; a Ray job runs in a copy of the working directory, "
            f"here {Path.cwd()}, which is deleted some time after the job",
            "give a URL, or an absolute path that every node sees; `mapo submit` makes a relative one absolute",
        )
    sources = [f"{key} {path}" for key, path in relative.items() if key.startswith("ingest.")]
    if sources:
        say(
            f"note: {', '.join(sources)}: relative, so read from this job's copy of the working directory; "
            "another job may read it again"
        )
