"""The models that an evaluation judges: base, aligned, checkpoints of the training, and others by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.stages.stage import digest
from pipelines.config import ALIGNED, BASE, CHECKPOINTS, NamedModel
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.model_files import ModelSource
from pipelines.samples.drawing import DrawnModel, Sampling

if TYPE_CHECKING:
    from orchestration.run.context import Run
    from orchestration.run.journal import StageRecord

UNETS = "evaluation/unets"
"""Folder of the UNets of checkpoints, below the run's; each is there only while samples of it are drawn."""


@dataclass(frozen=True)
class JudgedModel:
    """A model of an evaluation.

    Args:
        drawn: How samples of it are drawn.
        checkpoint: The checkpoint whose UNet has to be written before anything is drawn; None for other models.
    """

    drawn: DrawnModel
    checkpoint: str | None = None

    @property
    def name(self) -> str:
        """Its name in the results."""
        return self.drawn.name


def wanted_models(run: Run) -> list[str | NamedModel]:
    """Return the models of the configuration; without training only those that need none."""
    wanted = list(run.config.evaluate.models)
    if run.config.train is None:
        wanted = [model for model in wanted if model not in (ALIGNED, CHECKPOINTS)]
    return wanted


def is_here(model: str | NamedModel) -> bool:
    """Return whether a model is on this machine or the run's storage, so that nothing is fetched for its digest."""
    if isinstance(model, str):
        return True
    return all(place is None or Path(place).expanduser().exists() for place in (model.model, model.lora))


def models_identity(run: Run, trained: StageRecord | None, exported: StageRecord | None) -> list[Any]:
    """Return plain data that changes whenever a model of the evaluation does; fetches nothing but the base."""
    return [_identity(run, model, trained, exported) for model in wanted_models(run)]


def _identity(run: Run, model: str | NamedModel, trained: StageRecord | None, exported: StageRecord | None) -> Any:
    if model == ALIGNED:
        return [ALIGNED, _aligned_identity(trained, exported)]
    if model == CHECKPOINTS:
        return [CHECKPOINTS, _exported_kind(run, trained), [manifest.folder for manifest in _checkpoints(run, trained)]]
    if model == BASE:
        return [BASE, base_digest_of(run), _prediction_type(run)]
    assert isinstance(model, NamedModel)
    base = [base_digest_of(run), _prediction_type(run)] if model.model is None or model.unet else None
    return [model.model_dump(mode="json"), base, *(_state(place) for place in (model.model, model.lora))]


def _exported_kind(run: Run, trained: StageRecord | None) -> str:
    from orchestration.rounds.series import exported_of

    return "" if trained is None else exported_of(run, trained)[1]


def base_digest_of(run: Run) -> str:
    """Digest every file of the base that shapes a sample."""
    from pipelines.samples.fingerprint import samples_parts

    return digest(samples_parts(base_model(run), Sampling(1, 1.0, 1, 1))["model"])


def _aligned_identity(trained: StageRecord | None, exported: StageRecord | None) -> list[Any]:
    if trained is None or exported is None:
        return []
    manifest = trained.details.get("manifests", {}).get(exported.details.get("checkpoint"))
    return [exported.details.get("weights", exported.key), manifest]


def _state(place: str | None) -> Any:
    """Return names, sizes and times of a local model's files, so that a changed one is noticed without reading it."""
    path = None if place is None or "://" in place else Path(place).expanduser()
    if path is None or not path.exists():
        return None
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def judged_models(run: Run, trained: StageRecord | None, exported: StageRecord | None) -> list[JudgedModel]:
    """Return the models in the order of the configuration; checkpoints come in the order of their steps."""
    found: list[JudgedModel] = []
    for model in wanted_models(run):
        if model == CHECKPOINTS:
            found += _checkpoint_models(run, trained)
        elif model == BASE:
            found.append(JudgedModel(base_model(run)))
        elif model == ALIGNED:
            found.append(JudgedModel(_aligned_model(run, trained, exported)))
        else:
            assert isinstance(model, NamedModel)
            found.append(JudgedModel(_named_model(run, model)))
    return found


def base_model(run: Run) -> DrawnModel:
    """Return the run's base model."""
    return DrawnModel(BASE, _base(run), prediction_type=_prediction_type(run))


def _base(run: Run) -> ModelSource:
    from pipelines.encode.plan import with_absolute_paths

    assert run.config.encode is not None
    return with_absolute_paths(run.config.encode).source


def _prediction_type(run: Run) -> str | None:
    return None if run.config.train is None else run.config.train.prediction_type


def _aligned_model(run: Run, trained: StageRecord | None, exported: StageRecord | None) -> DrawnModel:
    """Return the exported model: a whole pipeline, or the base with the exported UNet."""
    identity = digest(base_digest_of(run), *_aligned_identity(trained, exported))
    where = run.storage.uri(run.model)
    if run.config.export.parts == "pipeline":
        return DrawnModel(ALIGNED, ModelSource(where), identity=identity)  # its scheduler file is right already
    return DrawnModel(ALIGNED, _base(run), f"{where}/unet", prediction_type=_prediction_type(run), identity=identity)


def _named_model(run: Run, named: NamedModel) -> DrawnModel:
    """Return another model: a pipeline, or the run's base with another UNet or a LoRA."""
    lora = None if named.lora is None else _absolute(named.lora)
    if named.model is None or named.unet:
        return DrawnModel(
            named.name, _base(run), None if named.model is None else _absolute(named.model), lora,
            _prediction_type(run), unet_revision=named.revision, unet_variant=named.variant,
        )  # fmt: skip
    return DrawnModel(
        named.name, ModelSource(_absolute(named.model), revision=named.revision, variant=named.variant), lora=lora
    )


def _absolute(place: str) -> str:
    path = Path(place).expanduser()
    return str(path.resolve()) if "://" not in place and path.exists() else place


def _checkpoints(run: Run, trained: StageRecord | None) -> list[Any]:
    from training.state.checkpoint_format import list_checkpoints

    checkpoint = None if trained is None else trained.details.get("checkpoint")
    return [] if checkpoint is None else list_checkpoints(run.storage, checkpoint.rpartition("/")[0])


def _checkpoint_models(run: Run, trained: StageRecord | None) -> Iterator[JudgedModel]:
    """Yield the complete checkpoints of the last training, each as the base with another UNet."""
    import hashlib

    from orchestration.rounds.series import exported_of
    from training.state.checkpoint_format import MANIFEST

    if trained is None:
        return
    kind, base = exported_of(run, trained)[1], base_digest_of(run)
    for manifest in _checkpoints(run, trained):
        of_manifest = hashlib.sha256(run.storage.read(f"{manifest.folder}/{MANIFEST}")).hexdigest()
        name = f"step-{manifest.step}"
        unet = f"{run.storage.uri(run.folder)}/{UNETS}/{name}/unet"
        identity = digest(base, of_manifest, kind)
        drawn = DrawnModel(name, _base(run), unet, prediction_type=_prediction_type(run), identity=identity)
        yield JudgedModel(drawn, manifest.folder)


def write_unets(run: Run, trained: StageRecord, models: list[JudgedModel]) -> None:
    """Write the UNets of checkpoints in diffusers' form; `remove_unets` deletes them once samples are drawn.

    Raises:
        ModelError: A checkpoint has no average, or is of another UNet.
        ShardCorrupt: A checkpoint is damaged.
    """
    from orchestration.stages.model_card import trained_with
    from training.export import export_model

    config = run.config.export.model_copy(update={"parts": "unet", "push_to_hub": None})
    for model in models:
        if model.checkpoint is not None:
            export_model(
                run.storage, checkpoint=model.checkpoint, source=_base(run),
                target=f"{run.folder}/{UNETS}/{model.name}", card=f"UNet of {model.checkpoint}\n", config=config,
                lora=trained_with(run.config, trained).lora,
            )  # fmt: skip


def remove_unets(run: Run) -> None:
    """Delete the UNets that `write_unets` wrote, also those of an evaluation that was interrupted."""
    for name in run.storage.names(f"{run.folder}/{UNETS}"):
        run.storage.delete(name)


def check_against(against: str, names: Sequence[str]) -> None:
    """Check that the model to compare with is judged.

    Raises:
        ConfigError: It is not, because it needs a training.
    """
    if against not in names:
        known = f"one of {', '.join(names)}" if names else "a model of `evaluate.models`, where there is none now"
        raise ConfigError(
            f"evaluate.against: there is no model {against} without training", f"set `evaluate.against` to {known}"
        )


def check_models(run: Run) -> None:
    """Check before any work that local models of the configuration exist.

    Raises:
        ConfigError: One does not.
    """
    from pipelines.dataset.model_fetch import HUB_ID

    names = [model if isinstance(model, str) else model.name for model in wanted_models(run)]
    check_against(run.config.evaluate.against, names)
    for model in run.config.evaluate.models:
        if not isinstance(model, NamedModel):
            continue
        for key, place in (("model", model.model), ("lora", model.lora)):
            is_elsewhere = place is None or "://" in place or (key == "model" and HUB_ID.fullmatch(place))
            if not is_elsewhere and not Path(str(place)).expanduser().exists():
                raise ConfigError(
                    f"evaluate.models: the {key} of {model.name} is not there: {Path(str(place)).absolute()}",
                    "give a folder, an fsspec URL" + (" or a hub id" if key == "model" else ""),
                )
