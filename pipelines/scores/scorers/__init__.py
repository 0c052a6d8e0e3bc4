"""The registry of scorers: what a name of the configuration stands for.

Importing the registry or the file of a family loads neither torch nor transformers; `load` of a scorer does.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from pipelines.dataset.errors import ConfigError
from pipelines.scores.scorers.imported import IMPORTED, ImportedScorer
from pipelines.scores.scorers.result import Failure, Result, Score
from pipelines.scores.scorers.scorer import Scorer, load_scorer, needs_of
from pipelines.scores.scorers.together import score_together
from pipelines.suites.results import VOTES

__all__ = [
    "SCORERS",
    "Failure",
    "Result",
    "Score",
    "Scorer",
    "load_scorer",
    "needs_of",
    "new_scorer",
    "score_together",
    "scorer_names",
]

_HERE = __name__
SCORERS = {
    "pickscore": f"{_HERE}.pickscore:PickScore",
    "hpsv2": f"{_HERE}.hps:HpsV20",
    "hpsv2-noantialias": f"{_HERE}.hps:HpsV20NoAntialias",
    "hpsv2.1": f"{_HERE}.hps:HpsV21",
    "hpsv2.1-noantialias": f"{_HERE}.hps:HpsV21NoAntialias",
    "imagereward": f"{_HERE}.imagereward:ImageReward",
    "blip-vqa": f"{_HERE}.blip_vqa:BlipVqa",
    "aesthetic": f"{_HERE}.aesthetic:Aesthetic",
    "clipscore": f"{_HERE}.clipscore:ClipScore",
    "clipscore-b32": f"{_HERE}.clipscore:ClipScoreB32",
    "clipscore-l14": f"{_HERE}.clipscore:ClipScoreL14",
    "clipscore-h14": f"{_HERE}.clipscore:ClipScoreH14",
    "dino": f"{_HERE}.subject:Dino",
    "clip-i": f"{_HERE}.subject:ClipI",
    "clip-t": f"{_HERE}.subject:ClipT",
    "compbench-clip-complex": f"{_HERE}.compbench_clip:CompbenchClipComplex",
    "csd": f"{_HERE}.style:Csd",
    "gram": f"{_HERE}.style:Gram",
    "dark_share": f"{_HERE}.pixels:DarkShare",
    "saturation": f"{_HERE}.pixels:Saturation",
    "edge_density": f"{_HERE}.pixels:EdgeDensity",
    "colour_entropy": f"{_HERE}.pixels:ColourEntropy",
    "grid_energy": f"{_HERE}.pixels:GridEnergy",
    "hpsv3": f"{_HERE}.hpsv3:HpsV3",
    "vqascore-qwen2-vl-7b": f"{_HERE}.vqascore:VqaScoreQwen2Vl7b",
    "vqascore-qwen3-vl-2b": f"{_HERE}.vqascore:VqaScoreQwen3Vl2b",
    "vqascore-qwen3-vl-8b": f"{_HERE}.vqascore:VqaScoreQwen3Vl8b",
    "graded_vlm": f"{_HERE}.graded_vlm:GradedVlm",
    "q16": f"{_HERE}.q16:Q16",
    "nudenet": f"{_HERE}.nudenet:NudeNet",
    "geneval": f"{_HERE}.geneval.scorer:GenEval",
    "near_duplicates": f"{_HERE}.duplicates:NearDuplicates",
}
"""Built-in scorers by name, as `module:Class`. None brings anything whose licence forbids commercial use or demands
more than attribution: `nudenet` needs a package that the user installs, `graded_vlm` a server that the user names."""


def scorer_names() -> list[str]:
    """Return the names of the built-in scorers, in the order of the registry."""
    return list(SCORERS)


def new_scorer(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Return a new scorer that is not loaded yet.

    Args:
        name: The name of a built-in scorer, or `module:Class`.
        options: Settings for its `configure`, which a scorer that has one needs before it scores; None to only look at
            its class.

    Raises:
        ConfigError: The name is unknown, the class cannot be imported, or it does not take the options.
    """
    scorer = _imported(name)
    if options is None:
        return scorer
    if hasattr(scorer, "configure"):
        scorer.configure(options)
    elif options:
        raise ConfigError(
            f"the scorer {name} has no options, but {', '.join(options)} is set",
            "leave its `options` out; a scorer with options has a method `configure`",
        )
    return scorer


def _imported(name: str) -> Any:
    if name.startswith(IMPORTED):
        return ImportedScorer(name)
    if name == VOTES:
        raise ConfigError(
            "votes are of people: no scorer makes them",
            f"name {VOTES} in `evaluate.scorers`, which counts what `mapo scores vote` has collected",
        )
    place = SCORERS.get(name, name)
    module, _, attribute = place.partition(":")
    if not attribute:
        raise ConfigError(
            f"there is no scorer {name}", f"choose from {', '.join(SCORERS)}, or name a class as `module:Class`"
        )
    try:
        return getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # of a module that anybody may have written
        raise ConfigError(
            f"cannot load the scorer {name}: {error}", "name a class as `module:Class` that can be imported"
        ) from error
