"""Small files that a process reads and parses once, and again only after they have changed."""

import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from pipelines.dataset.storage import Storage, patience_s, retry

T = TypeVar("T")

MARKS = ("ETag", "etag", "generation", "mtime", "LastModified", "last_modified", "created", "ino")
"""What file systems say of a file that changes when it is written again; each says some of it."""
SETTLED_S = 2.0  # clocks of file systems are coarse: a file this young may be written again without another time
_parsed: dict[Hashable, tuple[str, Any]] = {}
"""Place of a file and what was made of it -> the state in which it was read, and the result."""


def read_once(storage: Storage, name: str, parse: Callable[[bytes], T], *, as_what: Hashable) -> T | None:
    """Return what `parse` makes of a file; each call looks at size and mark, and reads the file only if they changed.

    Args:
        storage: The storage of the file.
        name: Its name.
        parse: Makes the result, which callers share and must not change. An error of it is raised each time.
        as_what: Names what `parse` makes; another name is another result of the same file.

    Returns:
        The result; None if there is no such file.

    Raises:
        StorageError: The file cannot be read.
    """
    state, place = _state(storage, name), (storage.url, name, as_what)
    if state is None:
        return None
    if state and place in _parsed:
        known, result = _parsed[place]
        if known == state:
            found: T = result
            return found
    data = storage.read_if_there(name)
    if data is None:
        return None
    parsed = parse(data)
    _parsed[place] = (state, parsed)
    return parsed


def _state(storage: Storage, name: str) -> str | None:
    """Return the size and the marks of a file; None if there is none, "" if they cannot tell whether it changes.

    They are asked for before the file is read: if it changes in between, the next look reads it again.
    """
    try:
        patience = 0.0 if storage.is_local else patience_s()
        info = retry(lambda: storage.fs.info(storage.path(name)), patience=patience)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception:  # each fsspec back end has its own exception tree; a read says what is wrong
        return ""
    marks = {key: str(info[key]) for key in MARKS if info.get(key) is not None}
    is_young = storage.is_local and time.time() - info["mtime"] < SETTLED_S
    return str([info.get("size"), marks]) if marks and not is_young else ""
