"""Names of tensors: beginnings replaced, layers counted."""

from collections.abc import Iterable, Mapping


def renamed(name: str, table: Mapping[str, str]) -> str:
    """Return the name with its known beginning replaced.

    Raises:
        KeyError: No beginning in the table is that of the name.
    """
    found = next((new + name.removeprefix(old) for old, new in table.items() if name.startswith(old)), None)
    if found is None:
        raise KeyError(f"{name} has no counterpart in transformers")
    return found


def num_layers(names: Iterable[str], prefix: str) -> int:
    """Return the number of numbered layers under a prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})
