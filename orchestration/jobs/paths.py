"""The local paths of a configuration: what a Ray job, which runs in a folder of its own, makes of them."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from orchestration.config import RunConfig, load_config
from orchestration.run.context import Say
from orchestration.run.job_id import JOB_VARIABLE
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.model_files import HUB_ID

NODE_LOCAL = ("train.cache_dir", "train.offload_path")
"""Folders that each node has for itself."""


def local_paths(config: RunConfig) -> dict[str, str]:
    """Every key that names a place on a file system, with its path as it is written; URLs and hub ids are left out."""
    return {key: path for key, path in _places(config) if path is not None and "://" not in path}


def _places(config: RunConfig) -> Iterator[tuple[str, str | None]]:
    yield "storage", config.storage.removeprefix("file://")
    for number, source in enumerate(config.ingest.sources if config.ingest else ()):
        yield f"ingest.sources.{number}.path", source.path.removeprefix("file://")
        yield f"ingest.sources.{number}.images", source.images and source.images.removeprefix("file://")
    if config.encode:
        yield "encode.model", _model(config.encode.model)
        yield "encode.vae", _model(config.encode.vae)
    if config.train:
        yield "train.cache_dir", config.train.cache_dir
        yield "train.offload_path", config.train.offload_path


def _model(name: str | None) -> str | None:
    """A model that is a folder; None if it is a hub id: a folder of that name goes first, as when it is loaded."""
    if name is None or (HUB_ID.fullmatch(name) and not Path(name).exists()):
        return None
    return name


def is_relative(path: str) -> bool:
    """Whether a path means something else in another working directory."""
    return not Path(path).expanduser().is_absolute()


def absolute_path(path: str) -> str:
    """The path as every process of this machine understands it; links stay as they are written."""
    return str(Path(os.path.abspath(Path(path).expanduser())))  # noqa: PTH100 (resolve() would follow links)


def absolute_overrides(config: RunConfig) -> list[str]:
    """`key=value` for every path that only this process understands: a relative one, or one that begins with `~`."""
    paths = local_paths(config).items()
    return [f"{key}={yaml_text(absolute_path(path))}" for key, path in paths if absolute_path(path) != path]


def load_located(file: str | Path, overrides: Sequence[str]) -> tuple[RunConfig, tuple[str, ...]]:
    """A configuration with every local path absolute, so that it is the same run in every folder and on every machine.

    Returns:
        It, and the overrides that make it of the file.

    Raises:
        ConfigError: As `load_config`.
    """
    every = (*overrides, *absolute_overrides(load_config(file, overrides)))
    return load_config(file, every), every


def shared_paths(config: RunConfig) -> dict[str, str]:
    """The absolute local paths that every node must see."""
    return {key: absolute_path(path) for key, path in local_paths(config).items() if key not in NODE_LOCAL}


def yaml_text(text: str) -> str:
    """A text that YAML reads as this text: as it is where that will do, else in quotes."""
    try:
        if yaml.safe_load(text) == text:
            return text
    except yaml.YAMLError:
        pass
    return json.dumps(text, ensure_ascii=False)


def check_inside_job(config: RunConfig, say: Say) -> None:
    """Nothing to do outside of a Ray job; inside, the working directory is a copy that goes some time after it.

    Relative sources are in that copy on every node, but another job finds them at another place, and reads them anew.

    Raises:
        ConfigError: The storage would lie in the copy, and be lost with it.
    """
    if not os.environ.get(JOB_VARIABLE):
        return
    relative = {key: path for key, path in local_paths(config).items() if is_relative(path)}
    if "storage" in relative:
        raise ConfigError(
            f"storage {relative['storage']} is a relative path; a Ray job runs in a copy of the working directory, "
            f"here {Path.cwd()}, which is deleted some time after it",
            "give a URL, or an absolute path that every node sees; `mapo submit` makes a relative one absolute",
        )
    sources = [f"{key} {path}" for key, path in relative.items() if key.startswith("ingest.")]
    if sources:
        say(
            f"note: {', '.join(sources)}: relative, so read from this job's copy of the working directory; "
            "another job may read it anew"
        )
