"""What a user sees of the suites: protocol, prompts, judges, licence, and whether the prompts are on this machine."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.suites.benchmarks import FAMILIES, GROUPS, Benchmark
from pipelines.suites.prompt_files import is_fetched, questions_file
from pipelines.suites.registry import benchmark, newest, suite_names, unknown
from pipelines.suites.starter import STARTER, starter


@dataclass(frozen=True)
class ListedSuite:
    """One suite, or a group of suites.

    Args:
        name: Name and version.
        about: What it measures and how.
        num_prompts: Number of prompts.
        images_per_prompt: Images of each.
        num_inference_steps: Denoising steps; None for a group.
        guidance_scale: Classifier-free guidance; None for a group.
        resolution: Side of the images in pixels; None for `encode.resolution`, and for a group.
        scorers: Its judges.
        licence: The licence of the prompts.
        source: Where they come from.
        sha256: Digest of the fetched prompts; None if they ship, if none is pinned, or for a group.
        is_cached: Whether the prompts are on this machine.
        needs_questions: Whether its judges ask questions, from a file of their own.
        has_questions: Whether that file is on this machine.
        differs: How it differs from what its authors publish.
        members: The suites of a group.
        foreign: Its judges that run in environments of their own, whose scores are imported.
        derived: Its judges that are merged from others.
    """

    name: str
    about: str
    num_prompts: int
    images_per_prompt: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    resolution: int | None
    scorers: tuple[str, ...]
    licence: str
    source: str
    sha256: str | None
    is_cached: bool
    needs_questions: bool = False
    has_questions: bool = False
    differs: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()

    @property
    def judges(self) -> tuple[str, ...]:
        """All of its judges."""
        return (*self.scorers, *self.foreign, *self.derived)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def list_suites(names: Sequence[str] | None = None) -> list[ListedSuite]:
    """Describe suites and groups.

    Args:
        names: Their names, with a version or without; None for all, those of FAMILIES under the family's name.

    Raises:
        ConfigError: A name is unknown.
    """
    if names is None:
        hidden = {member for family in FAMILIES for member in GROUPS[family]}
        names = [*(name for name in suite_names() if name not in hidden), *GROUPS]
    return [_listed(name) for name in names]


def _listed(name: str) -> ListedSuite:
    if (group := newest(name, GROUPS)) in GROUPS:
        return _of_group(group)
    if newest(name, [STARTER]) == STARTER:
        return _of_starter()
    found = benchmark(name)
    if found is None:
        raise unknown(name)
    return _of_benchmark(found)


def _of_starter() -> ListedSuite:
    suite = starter()
    return ListedSuite(
        suite.label, suite.protocol, len(suite.prompts), suite.images_per_prompt, suite.num_inference_steps,
        suite.guidance_scale, suite.resolution, suite.scorers, suite.licence, suite.source, None, is_cached=True,
    )  # fmt: skip


def _of_benchmark(found: Benchmark) -> ListedSuite:
    return ListedSuite(
        found.label,
        found.about,
        found.count,
        found.images_per_prompt,
        found.num_inference_steps,
        found.guidance_scale,
        found.resolution,
        found.scorers,
        found.set.licence,
        found.set.source,
        found.set.sha256,
        is_fetched(found.set),
        found.needs_questions,
        found.needs_questions and questions_file(found.set).is_file(),
        found.differs,
        foreign=found.foreign,
        derived=found.derived,
    )


def _of_group(label: str) -> ListedSuite:
    members = [_listed(name) for name in GROUPS[label]]
    images, asking = {each.images_per_prompt for each in members}, [each for each in members if each.needs_questions]
    return ListedSuite(
        label,
        f"{len(members)} suites, each with its own numbers.",
        sum(each.num_prompts for each in members),
        images.pop() if len(images) == 1 else None,
        None,
        None,
        None,
        _distinct(members, "scorers"),
        ", ".join(dict.fromkeys(each.licence for each in members)),
        "; ".join(dict.fromkeys(each.source for each in members)),
        None,
        all(each.is_cached for each in members),
        bool(asking),
        all(each.has_questions for each in asking),
        members=GROUPS[label],
        foreign=_distinct(members, "foreign"),
        derived=_distinct(members, "derived"),
    )


def _distinct(members: Sequence[ListedSuite], kind: str) -> tuple[str, ...]:
    """Return the judges of one kind of all members, each once."""
    return tuple(dict.fromkeys(itertools.chain.from_iterable(getattr(each, kind) for each in members)))


def sets_of(name: str) -> list[Benchmark]:
    """Return one benchmark for each prompt set that a suite or group needs; none for a suite that ships.

    Raises:
        ConfigError: The name is unknown.
    """
    listed = _listed(name)
    found = (benchmark(each) for each in listed.members or (listed.name,))
    return list({each.prompts: each for each in found if each is not None}.values())
