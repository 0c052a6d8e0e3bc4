"""The suite `starter`: 64 prompts of our own writing in four kinds, judged by pixels alone until a scorer is named."""

import json
from importlib.resources import files

from pipelines.suites.suite import Suite, SuitePrompt

FILE = "starter.jsonl"
STARTER = "starter@1"
PIXEL_SCORERS = ("dark_share", "saturation", "edge_density", "colour_entropy")


def starter() -> Suite:
    """Build the suite `starter@1`."""
    lines = files("pipelines.suites").joinpath(FILE).read_text(encoding="utf-8").splitlines()
    return Suite(
        name="starter",
        version=1,
        prompts=tuple(SuitePrompt.of(each["prompt"], each["kind"]) for each in map(json.loads, lines)),
        images_per_prompt=1,
        num_inference_steps=30,
        guidance_scale=5.0,
        scorers=PIXEL_SCORERS,
        protocol=(
            "64 prompts of four kinds, 16 each: people; objects that are counted, coloured or placed; scenes; styles."
            " One image a prompt, 30 steps, guidance 5, the side of the training images."
        ),
        licence="Apache-2.0",
        source="written for mapo",
    )
