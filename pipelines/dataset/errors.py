"""Every error a user can meet, as one tree.

    MapoError
    ├── ConfigError            the command or the configuration is wrong        (exit 2)
    └── JobError               the work failed                                  (exit 1)
        ├── SourceError        a preference source is missing or unreadable
        ├── StorageError       the storage cannot be read or written
        ├── ShardCorrupt       stored bytes differ from their digest
        ├── DropBudgetExceeded more rows were quarantined than the limit allows
        ├── ModelError         the base model is missing or not supported
        ├── EncodingError      an image or a prompt cannot be encoded on this machine
        ├── ClusterError       a Ray cluster cannot be reached, or refuses
        ├── LeaseError         another driver is working on the run
        ├── SnapshotError      the data set has nothing (or not enough) to work on
        └── TrainingError      training cannot start, or went wrong

A message gives numbers and place; `hint` gives the way out.
"""

from pipelines.dataset.secrets import redact


class MapoError(Exception):
    """Base of all errors with a message for the user; survives pickling between processes."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        message, hint = (
            redact(message),
            None if hint is None else redact(hint),
        )  # also where no command masks it: in a notebook, in a log
        super().__init__(message, hint)  # both in args, so that pickling keeps both
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class ConfigError(MapoError):
    """The command line or the configuration is wrong."""

    exit_code = 2


class JobError(MapoError):
    """A stage could not do its work."""


class SourceError(JobError):
    """A preference source is missing, unreadable or without required columns."""


class StorageError(JobError):
    """The storage cannot be read or written."""


class ShardCorrupt(JobError):
    """Stored bytes differ from the digest in the table."""


class DropBudgetExceeded(JobError):
    """More rows were quarantined than the configuration allows."""


class ModelError(JobError):
    """The base model is missing, incomplete or not supported."""


class EncodingError(JobError):
    """An image or a prompt cannot be encoded on this machine."""


class SnapshotError(JobError):
    """The data set does not contain what a stage needs."""


class ClusterError(JobError):
    """A Ray cluster does not answer, denies access, or refuses a request."""

    is_transient = False
    """Whether the same request may succeed a moment later."""
    ends_process = False
    """Whether Ray ends this process together with the cluster that it was connected to."""


class LeaseError(JobError):
    """Another driver is working on the run, or has taken it over."""


class TrainingError(JobError):
    """Training cannot start, or went wrong."""


def unwrap(error: BaseException) -> MapoError | None:
    """Return the original MapoError from another framework's wrapper; None if there is none.

    Ray re-raises a worker's error as its own class that also inherits from ours, with the original in `cause` and the
    worker's traceback as its text. Ray Data must be configured to keep the original (`quiet_ray_data`), and appends to
    its `args`; `message` and `hint` stay. An error in an actor's `__init__` arrives as text alone: load nothing there
    that can fail through a user's mistake.
    """
    waiting: list[object] = [error]
    for _ in range(32):  # chains are short; a circular one must end
        if not waiting:
            return None
        found = waiting.pop(0)
        if not isinstance(found, BaseException):
            continue
        cause = getattr(found, "cause", None)
        if isinstance(found, MapoError) and not isinstance(cause, BaseException):
            return type(found)(found.message, found.hint)
        waiting += [cause, found.__cause__]
    return None
