"""`mapo suites`: list the suites, and fetch the prompts of benchmarks."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.commands.options import JSON, Command, Option, place, say, say_json
from pipelines.dataset.errors import ModelError

if TYPE_CHECKING:
    from pipelines.dataset.storage import Storage
    from pipelines.suites.benchmarks import Benchmark
    from pipelines.suites.catalogue import ListedSuite

ALL = "all"


def _show(options: argparse.Namespace) -> None:
    from pipelines.suites.catalogue import list_suites

    found = list_suites(None if options.name == ALL else [options.name])
    if options.json:
        say_json([suite.to_json() for suite in found])
    elif options.name == ALL:
        say(table_text(found))
    else:
        say(suite_text(found[0]))


def table_text(suites: "list[ListedSuite]") -> str:
    """Return one line for each suite."""
    width = max(len(suite.name) for suite in suites)
    lines = []
    for each in suites:
        images = "" if each.images_per_prompt is None else f"x {each.images_per_prompt}"
        here = "here" if each.is_cached else "not here"
        judges = ", ".join(each.judges)
        lines.append(f"{each.name:<{width}}  {each.num_prompts:>6,} {images:<4}  {here:<8}  {judges}")
    more = "`mapo suites NAME` tells more; `mapo suites fetch NAME` brings prompts"
    return "\n".join([*lines, "", f"{more}; `held-out` and `prompts` are suites of a run's own prompts"])


def suite_text(suite: "ListedSuite") -> str:
    """Describe one suite for a terminal."""
    facts = [("prompts", f"{suite.num_prompts:,} ({suite.licence}), from {suite.source}"), *_protocol(suite)]
    facts += [("differs", each) for each in suite.differs]
    facts += [("suite", each) for each in suite.members]
    if suite.sha256 is not None:
        facts.append(("sha256", suite.sha256))
    facts.append(("here", "yes" if suite.is_cached else f"no: mapo suites fetch {suite.name}"))
    if suite.needs_questions:
        made = "no: make questions.jsonl with benchmarks/compbench_questions.py, and fetch with --from"
        facts.append(("questions", "yes" if suite.has_questions else made))
    return "\n".join([f"{suite.name}: {suite.about}", *(f"{name:<9} {told}" for name, told in facts)])


def _protocol(suite: "ListedSuite") -> list[tuple[str, str]]:
    """Say how a suite is drawn and judged."""
    facts = []
    if suite.images_per_prompt is not None:
        facts.append(("images", f"{suite.images_per_prompt} of each prompt"))
    if suite.num_inference_steps is not None:
        side = "the side of the training images" if suite.resolution is None else f"{suite.resolution} pixels"
        facts.append(("sampling", f"{suite.num_inference_steps} steps, guidance {suite.guidance_scale:g}, {side}"))
    facts.append(("judges", ", ".join(suite.scorers) or "none in process"))
    facts += [("imported", each) for each in suite.foreign]
    return facts + [("merged", each) for each in suite.derived]


def _fetch(options: argparse.Namespace) -> None:
    from pipelines.dataset.storage import Storage
    from pipelines.suites.catalogue import sets_of

    found = sets_of(options.name)
    if not found:
        say(f"{options.name} ships with mapo")
    for each in found:
        _bring(each, None if options.source is None else Path(options.source).expanduser())
        if options.to is not None:
            _send(each, Storage(options.to))


def _bring(found: "Benchmark", source: Path | None) -> None:
    """Bring what a benchmark needs to this machine; without a folder, prompts that are here whole stay."""
    from pipelines.suites.prompt_files import fetch_questions, fetch_set
    from pipelines.suites.reference_images import fetch_references

    if source is None and _is_whole(found):
        say(f"{found.prompts}: {found.set.count:,} prompts are here")
        return
    say(f"{found.prompts}: {found.set.count:,} prompts in {fetch_set(found.prompts, source)}")
    if source is None:
        return
    if (questions := fetch_questions(found.set, source)) is not None:
        say(f"{found.prompts}: questions in {questions}")
    if found.subject is not None and (count := fetch_references(found.set, source)):
        say(f"{found.prompts}: {count:,} images of subjects")


def _is_whole(found: "Benchmark") -> bool:
    """Return whether the prompts of a benchmark are on this machine and not damaged."""
    from pipelines.suites.prompt_files import find_set

    try:
        find_set(found.set, None, found.label)
    except ModelError:
        return False
    return True


def _send(found: "Benchmark", storage: "Storage") -> None:
    """Copy what was brought to a storage's cache."""
    from pipelines.suites.prompt_files import publish_set
    from pipelines.suites.reference_images import publish_references

    publish_set(found.prompts, storage)
    if found.subject is not None:
        publish_references(found.set, storage)
    say(f"{storage.uri('cache')}: runs on this storage find {found.prompts} there")


NAME = Option("NAME", "a suite", default=ALL)
ONE = Option("NAME", "a suite, or a group such as seed")
COMMANDS = (
    Command(
        "suites show",
        "list the suites: prompts, images, sampling, judges, licence, whether they are here; the word `show` may be "
        "left out",
        _show,
        (NAME, JSON),
    ),
    Command(
        "suites fetch",
        "bring the prompts of a suite to this machine, checked by their digest",
        _fetch,
        (
            ONE,
            Option("--from", "take the published files from here instead of the network", "FOLDER", dest="source"),
            Option("--to", "copy them to this storage's cache too, for drivers on a cluster", "STORAGE", type=place),
        ),
    ),
)
