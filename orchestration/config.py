"""The run's configuration: one YAML file, `-o` overrides, no unknown keys. Imports neither ray nor torch."""

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from pipelines.config import ALIGNED, BASE, CHECKPOINTS, EncodeConfig, EvaluateConfig, IngestConfig
from pipelines.dataset.config import Config
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.secrets import has_credentials, is_secret_name
from training import config as train_config
from training.config import ExportConfig, TrainConfig

LATER_KEYS: dict[str, Any] = {
    "encode.flips": False,
    "encode.prompt_chunks": 1,
    "encode.start_timeout_s": None,
    "evaluate.suites": None,
    "evaluate.prompts": None,
    "evaluate.models": [BASE, ALIGNED],
    "evaluate.against": BASE,
    "evaluate.images_per_prompt": None,
    "evaluate.resolution": None,
    "evaluate.dtype": "auto",
    "evaluate.num_workers": 1,
    "evaluate.limit_prompts": None,
    "evaluate.max_audit_pairs": 512,
    "train.trouble.both_errors_grow": "warn",
    "train.trouble.min_error_growth": 1.1,
    **{f"train.{name}": default for name, default in train_config.LATER_KEYS.items()},
}
"""Keys that later versions added, with their defaults: at its default a key changes no configuration's digest."""
FORMER_DEFAULTS = {"evaluate.num_inference_steps": 30, "evaluate.guidance_scale": 5.0}
"""Keys that had a number as their default and now leave it to the suite, whose number is the same."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What PyYAML raises: also for a date or a number that cannot be, and for brackets in brackets."""


class ReportConfig(Config):
    """The section `report`."""

    gpu_hour_price: float | None = Field(None, ge=0)
    """Price of one GPU hour. With it the report shows the cost of a run, otherwise only its hours."""
    currency: str = Field("EUR", pattern="^[A-Z]{3}$")
    """Currency of that price, as three letters: `EUR`, `USD`."""


class RunConfig(Config):
    """A run: its storage, and the settings of each stage."""

    name: str
    """The run's name, which is also its folder: letters, digits, '.', '_' and '-'."""
    storage: str = Field(min_length=1)
    """A path or any fsspec URL, below which data set and runs are stored."""
    seed: int = Field(0, ge=0)
    """Random seed of order, noise, timesteps and samples."""
    ingest: IngestConfig | None = None
    """From preference sources to pair shards."""
    encode: EncodeConfig | None = None
    """From pair shards to latent and text shards."""
    train: TrainConfig | None = None
    """Training with a preference loss on Ray Train and DeepSpeed ZeRO."""
    export: ExportConfig = ExportConfig()
    """From a checkpoint to a diffusers model."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Samples and scores, base against aligned."""
    report: ReportConfig = ReportConfig()
    """The run's report, and the index of runs."""

    @field_validator("name")
    @classmethod
    def name_is_a_folder(cls, value: str) -> str:
        """Check that the name is one part of a path on every file system."""
        if not NAME.fullmatch(value):
            raise ValueError(f"{value!r} cannot be a folder's name; use letters, digits, '.', '_' and '-'")
        return value

    @model_validator(mode="after")
    def flips_are_encoded(self) -> Self:
        """Check that mirrored images are encoded: training cannot mirror a latent."""
        if self.train is not None and self.train.flips != "none" and (self.encode is None or not self.encode.flips):
            raise ValueError(
                f"train.flips is {self.train.flips}, but mirrored images are not encoded, and a mirrored latent is not "
                "the latent of a mirrored image\nhint: set `encode.flips: true`, or `train.flips: none`"
            )
        return self

    @property
    def wants_empty_prompt(self) -> bool:
        """Whether training replaces dropped prompts with the embedding of "", so that `encode` must store it."""
        return self.train is not None and self.train.null_prompt == "empty"

    @property
    def only_judges(self) -> bool:
        """Whether the run only judges models: it has neither `ingest` nor `train`, and no model of it needs a training.

        Since `evaluate.models` has `aligned` by default, such a run has to name its models.
        """
        needs_training = any(model in (ALIGNED, CHECKPOINTS) for model in self.evaluate.models)
        return self.ingest is None and self.train is None and not needs_training


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `key.path=value` overrides, check everything.

    Raises:
        ConfigError: The file is missing or not YAML, or a key or value is wrong; the message names each.
    """
    return parse_config(read_text(file), overrides, source=str(file))


def read_text(file: str | Path) -> str:
    """Read a configuration file; once, for it may be a pipe.

    Raises:
        ConfigError: It cannot be read, or is not text.
    """
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {file}: {error.strerror}", "see `mapo run --help`, or try `mapo demo`"
        ) from error
    except ValueError as error:
        raise ConfigError(f"the configuration {file} is not UTF-8 text: {error}", "save it as UTF-8") from error


def parse_config(text: str, overrides: Sequence[str] = (), *, source: str = "configuration") -> RunConfig:
    """Parse a configuration from a text, like `load_config`; `source` names it in errors."""
    return check_data(yaml_of(text, source), overrides, source=source)


def yaml_of(text: str, source: str) -> Any:
    """Return the data of a YAML text; `source` names it in errors.

    Raises:
        ConfigError: It is not YAML.
    """
    try:
        return yaml.safe_load(text)
    except NOT_YAML as error:
        raise ConfigError(f"{source} is not valid YAML: {error}", "check the indentation and the colons") from error


def check_data(data: Any, overrides: Sequence[str] = (), *, source: str = "configuration") -> RunConfig:
    """Check a configuration of plain data, like `load_config`; the data is changed by the overrides."""
    if not isinstance(data, dict) or not data:
        raise ConfigError(f"{source} has no keys", "it needs at least `name` and `storage`")
    if isinstance(overrides, str):
        raise ConfigError(f"overrides is one text, {overrides!r}", "give a list, such as ['train.max_steps=100']")
    for override in overrides:
        _apply(data, override)
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise _as_config_error(error, source) from None
    _refuse_secrets(config)
    return config


def _refuse_secrets(config: RunConfig) -> None:
    """Reject secrets: the configuration is stored with the run, shown in the report and sent with jobs."""
    found = list(_credentials(config.model_dump(mode="json"), ()))
    if config.train is not None:
        found += [f"train.environment.{name}" for name in config.train.environment if is_secret_name(name)]
    if found:
        raise ConfigError(
            f"the configuration contains a secret, at {', '.join(f'`{where}`' for where in found)}",
            "remove it, and set it in the environment of the processes (on Kubernetes with a Secret)",
        )


def _credentials(value: Any, where: tuple[str, ...]) -> Iterator[str]:
    """Find the keys of URLs with a password or a signature."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _credentials(inner, (*where, str(key)))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _credentials(inner, (*where, str(place)))
    elif isinstance(value, str) and has_credentials(value):
        yield ".".join(where)


def resolved_json(config: RunConfig) -> str:
    """Return the whole configuration with every default, as it is saved with a run."""
    return json.dumps(config.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"


def comparable(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain data for a digest, without later keys that have their default."""
    found = config.model_dump(mode="json")
    for path, default in LATER_KEYS.items():
        *sections, key = path.split(".")
        place: Any = found
        for section in sections:
            place = (place or {}).get(section)
        if place and place.get(key, default) == default:
            place.pop(key, None)
    for path, default in FORMER_DEFAULTS.items():
        section, _, key = path.partition(".")
        if found[section][key] is None:
            found[section][key] = default
    return found


def _apply(data: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"-o {override}: not key.path=value", "for example `-o train.max_steps=100`")
    try:
        value = yaml.safe_load(text)
    except NOT_YAML as error:
        raise ConfigError(f"-o {override}: the value is not valid YAML", "quote it") from error
    *parents, last = path.split(".")
    place: Any = data
    for key in parents:
        place = _step_into(place, key, override)
    if isinstance(place, list):
        place[_position(place, last, override)] = value
    else:
        place[last] = value


def _step_into(place: Any, key: str, override: str) -> Any:
    if isinstance(place, list):
        return place[_position(place, key, override)]
    if place.get(key) is None:
        place[key] = {}
    if not isinstance(place[key], dict | list):
        raise ConfigError(f"-o {override}: {key} is a value, not a section", "remove the keys after it")
    return place[key]


def _position(place: list[Any], key: str, override: str) -> int:
    if not (key.isascii() and key.isdecimal()) or int(key) >= len(place):
        raise ConfigError(f"-o {override}: {key!r} is not an index of a list of {len(place)}", "indices start at 0")
    return int(key)


def _as_config_error(error: ValidationError, source: str) -> ConfigError:
    lines, hints = [], []
    problems = error.errors()
    for problem in problems:
        if any(_is_inside(other["loc"], problem["loc"]) for other in problems):
            continue  # a section is wrong because something in it is
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key `{where}`")
            if near := _nearest(problem["loc"]):
                hints.append(near)
            continue
        message, _, hint = str(problem["msg"]).removeprefix("Value error, ").partition("\nhint: ")
        given = problem["input"]
        shown = f" (it is {given!r})" if isinstance(given, str | int | float | bool) else ""
        lines.append(message if not where or message.startswith(where) else f"`{where}`: {message}{shown}")
        if hint:
            hints.append(hint)
    hint = "; ".join(dict.fromkeys(hints)) or "every key is described in docs/reference/configuration.md"
    return ConfigError(f"{source}: " + "\n".join(lines), hint)


def _is_inside(inner: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _nearest(location: tuple[int | str, ...]) -> str | None:
    """Suggest a key for an unknown one: the nearest of its section, or else a list of the section's keys."""
    section: Any = RunConfig
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        section = _model_in(section.model_fields[part].annotation) if part in section.model_fields else None
        if section is None:
            return None
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    prefix = ".".join(str(part) for part in location[:-1])
    if close:
        return f"did you mean `{f'{prefix}.' if prefix else ''}{close[0]}`?"
    return f"known keys{f' of {prefix}' if prefix else ''}: {', '.join(known)}"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the configuration section inside `X | None`, `tuple[X, ...]` or `X`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (tuple, list, typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            if (found := _model_in(argument)) is not None:
                return found
    return None
