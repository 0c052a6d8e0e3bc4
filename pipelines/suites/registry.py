"""The registry of suites, by name: what a name in a configuration stands for.

`starter` ships. Benchmarks are fetched first: `benchmarks.BENCHMARKS` has one entry for each. `held-out` and `prompts`
are no entries, because their prompts come from a run.
"""

from collections.abc import Iterable, Sequence

from pipelines.dataset.errors import ConfigError
from pipelines.dataset.storage import Storage
from pipelines.suites.benchmarks import BENCHMARKS, FAMILIES, GROUPS, Benchmark
from pipelines.suites.prompt_files import PromptFiles
from pipelines.suites.reference_images import find_references
from pipelines.suites.starter import STARTER, starter
from pipelines.suites.suite import Suite

HELD_OUT, PROMPTS = "held-out", "prompts"
"""Suites of a run's own prompts: its held-out pairs, and its file of prompts."""
_BENCHMARKS = {each.label: each for each in BENCHMARKS}


def suite_names() -> list[str]:
    """Return the names of the suites with their versions, in the order of the registry; groups are left out."""
    return [STARTER, *_BENCHMARKS]


def expanded(names: Iterable[str]) -> list[str]:
    """Return the names of suites with every group replaced by its members; each suite once.

    Args:
        names: Names of suites and groups, with a version or without.
    """
    found: dict[str, None] = {}
    for name in names:
        members: Sequence[str] = GROUPS.get(newest(name, GROUPS), (name,))
        known = {newest(each, suite_names()) for each in found}
        found.update(dict.fromkeys(each for each in members if newest(each, suite_names()) not in known))
    return list(found)


def benchmark(name: str) -> Benchmark | None:
    """Return the protocol of a benchmark; None if the name stands for none.

    Args:
        name: `name@version`, or the name alone for its newest version.
    """
    return _BENCHMARKS.get(newest(name, _BENCHMARKS))


def load_suite(name: str, storage: Storage | None = None) -> Suite:
    """Build a suite.

    Args:
        name: `name@version`, or the name alone for its newest version.
        storage: The storage whose cache may hold the prompts; this machine's is looked in as well.

    Raises:
        ConfigError: There is no such suite, or no such version of it.
        ModelError: Its prompts, the questions that its judges ask, or the images of its subject were not fetched.
    """
    return load_suites([name], storage)[0]


def load_suites(names: Iterable[str], storage: Storage | None = None) -> list[Suite]:
    """Build suites, which may share files of prompts: see `load_suite`."""
    files = PromptFiles(storage)
    return [_load(name, files, storage) for name in names]


def _load(name: str, files: PromptFiles, storage: Storage | None) -> Suite:
    if newest(name, [STARTER]) == STARTER:
        return starter()
    found = benchmark(name)
    if found is None:
        raise unknown(name)
    rows = files.rows(found.set, found.label)
    questions = files.questions(found.set, found.label) if found.needs_questions else None
    subject = found.subject
    references = None if subject is None else find_references(found.set, subject, storage, found.label)
    return found.suite(rows, questions, references)


def unknown(name: str) -> ConfigError:
    """Return the error about a name that stands for no suite, or for one whose prompts come from a run."""
    if name in (HELD_OUT, PROMPTS):
        return ConfigError(
            f"the suite {name} has the prompts of a run: there is nothing to list or fetch before it",
            "name it in `evaluate.suites`",
        )
    listed = [each for each in _BENCHMARKS if not any(each in GROUPS[family] for family in FAMILIES)]
    known = ", ".join((HELD_OUT, PROMPTS, STARTER, *listed, *GROUPS))
    return ConfigError(f"there is no suite {name}", f"choose from {known}; `mapo suites` lists all")


def newest(name: str, labels: Iterable[str]) -> str:
    """Return the label that a name stands for: itself, or the newest version of the name alone."""
    newest = {label.partition("@")[0]: label for label in labels}
    return newest.get(name, name)
