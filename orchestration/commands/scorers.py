"""`mapo scorers`: list the scorers, fetch their weights, check them against published values."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.commands.options import JSON, Command, Option, place, say, say_json

if TYPE_CHECKING:
    from pipelines.scores.catalogue import ListedScorer

ALL = "all"


def _show(options: argparse.Namespace) -> None:
    from pipelines.scores.catalogue import list_scorers
    from pipelines.scores.scorers import scorer_names

    found = list_scorers(scorer_names() if options.name == ALL else [options.name])
    if options.json:
        say_json([scorer.to_json() for scorer in found])
    elif options.name == ALL:
        say(table_text(found))
    else:
        say(scorer_text(found[0]))


def table_text(scorers: "list[ListedScorer]") -> str:
    """Return one line for each scorer."""
    width = max(len(scorer.name) for scorer in scorers)
    lines = []
    for each in scorers:
        licence = each.licence if each.parts else ""
        lines.append(f"{each.name:<{width}}  {_cached(each):<10}  {licence:<12}  {each.measures}")
    return "\n".join([*lines, "", "`mapo scorers NAME` tells more; `mapo scorers fetch NAME` brings weights"])


def _cached(scorer: "ListedScorer") -> str:
    if not scorer.parts:
        return "no weights"
    return "fetched" if scorer.is_cached else "not here"


def scorer_text(scorer: "ListedScorer") -> str:
    """Describe one scorer for a terminal."""
    better = "higher is better" if scorer.higher_is_better else "lower is better"
    lines = [
        f"{scorer.name}: {scorer.measures}",
        f"{'scale':<9} {scorer.scale or 'not stated'}; {better}",
        f"{'needs':<9} {', '.join(scorer.needs)}",
        f"{'licence':<9} {scorer.licence}",
    ]
    for part in scorer.parts:
        where = "fetched" if part.is_cached else "not on this machine"
        lines.append(f"{'weights':<9} {part.name} from {part.source} ({part.licence}): {where}")
    lines.append(f"{'values':<9} {scorer.verified}")
    if scorer.published is not None and scorer.verified.startswith("not"):
        lines.append(f"{'':<9} published: {scorer.published}; `mapo scorers check {scorer.name} --images FOLDER`")
    if not scorer.is_cached:
        lines.append(f"{'fetch':<9} mapo scorers fetch {scorer.name}")
    return "\n".join(lines)


def _fetch(options: argparse.Namespace) -> None:
    from pipelines.dataset.storage import Storage
    from pipelines.scores.cluster_weights import locate_parts, publish, publish_records
    from pipelines.scores.verified import publish_verification
    from pipelines.scores.weights import fetch, parts_of

    names = parts_of(options.name)
    if not names:
        say(f"{options.name} needs no weights")
        return
    root = fetch(options.name, None if options.source is None else Path(options.source).expanduser())
    parts = locate_parts(options.name, names, None)
    for part in parts:
        say(f"{part.name}: {part.num_bytes / 1e6:,.1f} MB in {root / part.name}")
    if options.to is not None:
        storage = Storage(options.to)
        sent = publish(parts, storage, say)
        publish_records(parts, storage)
        publish_verification(options.name, storage)
        say(f"{storage.uri('cache')}: {sent:,} new bytes; runs on this storage find {options.name} there")


def _check(options: argparse.Namespace) -> None:
    from pipelines.dataset.errors import ModelError
    from pipelines.scores.catalogue import list_scorers
    from pipelines.scores.golden import GOLDEN, check_golden
    from pipelines.scores.scorers import scorer_names

    if options.images is not None and not Path(options.images).expanduser().is_dir():
        raise ModelError(f"{options.images} is no folder", "--images names the folder with the published images")
    names = scorer_names() if options.name == ALL else [options.name]
    for listed in list_scorers(names):
        if options.images is not None and listed.name in GOLDEN and (listed.is_cached or options.name != ALL):
            for value in check_golden(listed.name, Path(options.images).expanduser()):
                say(f"{listed.name}: {value.image} {value.found:.4f}, published {value.published:.4f}")
            say(f"{listed.name}: verified against {GOLDEN[listed.name].source}")
            continue
        golden = GOLDEN.get(listed.name)
        if golden is None or not listed.verified.startswith("not"):
            say(f"{listed.name}: {listed.verified}")
        else:
            say(f"{listed.name}: {listed.verified}; {golden.source} has some, for the images in {golden.images}")


NAME = Option("NAME", "a scorer", default=ALL)
ONE = Option("NAME", "a scorer")
COMMANDS = (
    Command(
        "scorers show",
        "list the scorers: what they measure, scale, weights, licence, whether they are here and verified; the word "
        "`show` may be left out",
        _show,
        (NAME, JSON),
    ),
    Command(
        "scorers fetch",
        "bring a scorer's weights to this machine, checked and converted to safetensors",
        _fetch,
        (
            ONE,
            Option("--from", "take the published files from here instead of the hub", "FILE_OR_FOLDER", dest="source"),
            Option("--to", "copy them to this storage's cache too, for the nodes of a cluster", "STORAGE", type=place),
        ),
    ),
    Command(
        "scorers check",
        "compare a scorer with published values, and record that it gives them",
        _check,
        (NAME, Option("--images", "the published images, which do not ship with mapo", "FOLDER")),
    ),
)
