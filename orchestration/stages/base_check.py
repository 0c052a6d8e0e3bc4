"""Checks before any work, and for a plan, whether training supports a run's base model."""

from dataclasses import dataclass

from orchestration.config import RunConfig
from orchestration.run.context import Run
from pipelines.dataset.base_model import check_base
from pipelines.dataset.errors import MapoError
from pipelines.dataset.model_files import read_config
from training.options import check_timesteps

NOT_FETCHED = "the base model is not on this machine yet; it will be fetched and checked before any work"


@dataclass(frozen=True)
class BaseCheck:
    """The result of checking a base model: why it is rejected, or remarks on it."""

    refusal: MapoError | None = None
    remarks: tuple[str, ...] = ()


def check_base_model(config: RunConfig) -> list[str]:
    """Check that training supports the base model, before hours of ingest rather than after.

    Returns:
        Remarks for the user, one line each.

    Raises:
        ModelError: The base model is not supported.
        ConfigError: The section `encode` does not fit it, or `train.timesteps` does not fit its noise schedule.
    """
    from pipelines.encode.plan import check_settings

    assert config.encode is not None
    check_settings(config.encode)
    predicted = None if config.train is None else config.train.prediction_type
    facts = check_base(config.encode.source, prediction_type=predicted)
    if config.train is not None:
        schedule = read_config(config.encode.source.folder() / "scheduler" / "scheduler_config.json")
        check_timesteps(config.train.timesteps, int(schedule["num_train_timesteps"]))
    note = facts.resolution_note(config.encode.resolution)
    return [*facts.notes, *([] if note is None else [note])]


def check_model(config: RunConfig) -> None:
    """Check the base model and the settings for it, before hours of ingest rather than after."""
    from pipelines.encode.plan import check_settings

    assert config.encode is not None
    check_settings(config.encode)


def check_training(run: Run) -> None:
    """Check before anything starts that the trackers are installed and the next round can start."""
    from orchestration.rounds.series import check_next_round
    from training.tracking.trackers import check_trackers

    if run.config.train is not None:
        check_trackers(run.config.train.trackers)
        check_next_round(run)


def run_base_check(run: Run) -> BaseCheck:
    """Check the base model for a plan, which fetches nothing."""
    encode = run.config.encode
    if encode is None:
        return BaseCheck()
    try:
        if not encode.source.is_fetched():
            return BaseCheck(remarks=(NOT_FETCHED,))
        return BaseCheck(remarks=tuple(check_base_model(run.config)))
    except MapoError as error:
        return BaseCheck(error)
