"""One NumPy array from a pickle, without running any code that the pickle names."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUMBERS = "fiu"
"""Kinds of element types that are numbers."""


def _latin_1(text: str, encoding: str) -> bytes:
    """Return bytes that an old pickle of Python 3 holds as text."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding}")
    return text.encode("latin-1")


def _reconstruct(kind: Any, shape: Any, code: Any) -> NDArray[Any]:
    """Return the empty array that a pickle fills; what it shall be filled with follows."""
    if kind is not np.ndarray:
        raise pickle.UnpicklingError(f"an array of the class {kind!r}")
    return np.ndarray((0,), np.int8)


ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _latin_1,
}
"""Everything that a pickle may name."""


class _Arrays(pickle.Unpickler):
    """Unpickler that knows arrays alone."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a pickle may name, and refuse all else."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an array")
        return ALLOWED[module, name]


def read_array(file: Path) -> NDArray[np.float32]:
    """Return the array of a pickle, as float32.

    Raises:
        pickle.UnpicklingError: The pickle names anything else than arrays, or holds no array of numbers.
    """
    with file.open("rb") as opened:
        found = _Arrays(opened).load()
    if not isinstance(found, np.ndarray) or found.dtype.kind not in NUMBERS:
        raise pickle.UnpicklingError(f"it holds {type(found).__name__}, not an array of numbers")
    return found.astype(np.float32)
