"""The journal of a session of votes: one line for each vote, on the disk before the next pair is shown.

The first line is the session. A later line is a vote, or takes the last one back. A line that a kill cut off is dropped
when the journal is opened again; whatever was acknowledged is whole.
"""

import fcntl
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

from pipelines.dataset.errors import ConfigError, StorageError
from pipelines.scores.votes import BETTER, TIE, WORSE, Session, Vote

VERSION = 1
ANOTHER = "name another file with `--out`"


class VoteJournal:
    """A session's votes in a local file, which one process at a time may open.

    Args:
        file: The file; created with `session` if it is not there.
        session: The session, if the journal is new; else it must be about the same models, suite, samples and seed.

    Raises:
        ConfigError: The file is no journal of votes, is about something else, or another process has it open.
        StorageError: It cannot be written.
    """

    def __init__(self, file: Path, session: Session) -> None:
        self.file = file
        if not file.exists():
            self._create(session)
        self._opened = self._open()
        try:
            whole, _, rest = self._opened.read().rpartition(b"\n")
            first, *lines = whole.split(b"\n")
            self.session = self._header(first, session)
            self._votes: dict[str, Vote] = {}
            for number, line in enumerate(lines, 2):
                self._replay(number, line)
            self._opened.truncate(self._opened.tell() - len(rest))
        except BaseException:
            self._opened.close()
            raise

    @property
    def votes(self) -> list[Vote]:
        """The votes that stand, oldest first."""
        return list(self._votes.values())

    def add(self, vote: Vote) -> None:
        """Append a vote; it is on the disk when this returns.

        Raises:
            StorageError: It cannot be written; the journal is as it was.
        """
        self._append(asdict(vote))
        self._votes[vote.ballot] = vote

    def undo(self) -> None:
        """Take the last vote back; like `add`."""
        last = next(reversed(self._votes))
        self._append({"undo": last})
        del self._votes[last]

    def close(self) -> None:
        """Close the file, so that another process may open it."""
        self._opened.close()

    def _create(self, session: Session) -> None:
        """Create the journal with its first line, as a whole."""
        temporary = self.file.with_name(f".{self.file.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with temporary.open("wb") as out:
                out.write(_line({"version": VERSION, **asdict(session)}))
                out.flush()
                os.fsync(out.fileno())
            temporary.rename(self.file)
            _sync_folder(self.file.parent)
        except OSError as error:
            raise ConfigError(f"cannot write the journal {self.file}: {error.strerror}", ANOTHER) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _open(self) -> FileIO:
        try:
            opened = self.file.open("r+b", buffering=0)
        except OSError as error:
            raise ConfigError(f"cannot write the journal {self.file}: {error.strerror}", ANOTHER) from error
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        except OSError as error:
            opened.close()
            raise ConfigError(
                f"another process is voting with the journal {self.file}", f"end that one, or {ANOTHER}"
            ) from error
        return opened

    def _header(self, line: bytes, wanted: Session) -> Session:
        data = self._object(1, line)
        try:
            if data["version"] != VERSION:
                raise ValueError(data["version"])
            (one, other), (of_one, of_other) = data["models"], data["samples"]
            found = Session(str(data["id"]), str(data["suite"]), (one, other), (of_one, of_other), int(data["seed"]))
        except (KeyError, TypeError, ValueError):
            raise self._not_one(1) from None
        if (found.suite, found.models) != (wanted.suite, wanted.models):
            raise ConfigError(
                f"the journal {self.file} is about {' and '.join(found.models)} on {found.suite}, not about"
                f" {' and '.join(wanted.models)} on {wanted.suite}",
                ANOTHER,
            )
        if (found.samples, found.seed) != (wanted.samples, wanted.seed):
            raise ConfigError(
                f"the journal {self.file} is about other images of {' and '.join(found.models)}: a model, the sampling"
                " or the seed has changed since",
                ANOTHER,
            )
        return found

    def _replay(self, number: int, line: bytes) -> None:
        data = self._object(number, line)
        try:
            if "undo" in data:
                del self._votes[data["undo"]]
            else:
                vote = _checked(Vote(data["ballot"], data["value"], data["left"], data["time"]))
                self._votes[vote.ballot] = vote
        except (KeyError, TypeError, ValueError):
            raise self._not_one(number) from None

    def _object(self, number: int, line: bytes) -> Mapping[str, Any]:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            raise self._not_one(number) from None
        if not isinstance(found, dict):
            raise self._not_one(number)
        return found

    def _not_one(self, number: int) -> ConfigError:
        return ConfigError(f"{self.file} is not a journal of votes: line {number} is none of its lines", ANOTHER)

    def _append(self, data: Mapping[str, Any]) -> None:
        line, end = _line(data), self._opened.seek(0, os.SEEK_END)
        try:
            if self._opened.write(line) < len(line):
                raise OSError(0, "the line was cut short")
            os.fsync(self._opened.fileno())
        except OSError as error:
            self._opened.truncate(end)  # so that a later line does not follow a part of this one
            raise StorageError(
                f"cannot write the journal {self.file}: {error.strerror}", "is the disk full?"
            ) from error


def _checked(vote: Vote) -> Vote:
    """Return a vote that was read.

    Raises:
        ValueError: A field is of another kind.
    """
    is_one = isinstance(vote.ballot, str) and isinstance(vote.time, str)
    if not is_one or vote.value not in (BETTER, TIE, WORSE, None) or vote.left not in (0, 1):
        raise ValueError(vote)
    return vote


def _line(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data).encode() + b"\n"


def _sync_folder(folder: Path) -> None:
    """Make a new file's name durable."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
