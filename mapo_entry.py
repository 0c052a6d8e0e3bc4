"""The start of the `mapo` command; whoever imports this module gets mapo's packages by their names.

`pipelines`, `training` and `orchestration` are names that a user's own folder may have too. This module lies beside
mapo's and has a name that nobody else uses, so it knows where they are. It needs the standard library alone.
docs/decisions/0020-import-names.md tells why it is so.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

HOME = Path(__file__).resolve().parent
NAMES = ("pipelines", "training", "orchestration")
"""The packages that lie beside this module."""


def main() -> None:
    """Run the `mapo` command; the console script."""
    from orchestration.cli import entry

    entry()


class MapoNames:
    """Find mapo's packages beside this module; leave every other name to the other finders."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return where a package of mapo lies, or None for any other module."""
        return PathFinder.find_spec(name, [str(HOME)], target) if name in NAMES else None


def claim_names() -> None:
    """Let the names mean mapo's packages in this process, whatever else is on its path.

    Raises:
        ImportError: One of them is imported already, from somewhere else.
    """
    for name in NAMES:
        found = sys.modules.get(name)
        file = getattr(found, "__file__", None)
        for place in getattr(found, "__path__", [file] if file else []):
            if Path(place).resolve() != HOME / name:
                raise ImportError(
                    f"`{name}` is imported already, from {place}, and mapo needs its own in {HOME}; "
                    "run mapo in a process of its own, or import `orchestration` first"
                )
    if MapoNames not in sys.meta_path:
        sys.meta_path.insert(0, MapoNames)


def worker_hook() -> Callable[[], None]:
    """Return a function that claims the names in a Ray worker; Ray calls it when the worker starts.

    It is pickled by value, since a worker may find this module only later, by a path that comes with its first task.
    """
    names = NAMES

    def claim_at_first_use() -> None:
        import contextlib
        import sys
        from importlib.machinery import ModuleSpec

        class FirstUse:
            @staticmethod
            def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
                if name not in names:
                    return None
                with contextlib.suppress(ModuleNotFoundError):  # only mapo's three folders were sent
                    import mapo_entry

                    return mapo_entry.MapoNames.find_spec(name)
                return None

        sys.meta_path.insert(0, FirstUse)

    return claim_at_first_use


claim_names()

if __name__ == "__main__":
    main()
