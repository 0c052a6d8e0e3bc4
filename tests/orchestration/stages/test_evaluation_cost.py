"""The cost of drawing, said before it begins: the arithmetic of SDXL at 1024 pixels."""

import json
from pathlib import Path

import pytest

from orchestration.stages.evaluation_cost import REFERENCE_FLOPS_PER_S, cost_line, sample_flops
from pipelines.samples.drawing import Sampling
from pipelines.suites.benchmarks import BENCHMARKS, GROUPS

UNET = Path(__file__).parents[3].parent / "shared" / "sdxl" / "unet" / "config.json"
needs_sdxl = pytest.mark.skipif(not UNET.is_file(), reason="needs ../shared/sdxl")


@needs_sdxl
def test_an_image_of_sdxl_takes_what_was_derived_for_it() -> None:
    """686 TFLOP for 50 steps with guidance, and 2.2 s on an H200."""
    flops = sample_flops(json.loads(UNET.read_text()), Sampling(50, 5.0, 1024, 1024))
    assert flops == pytest.approx(686e12, rel=0.01)
    assert flops / REFERENCE_FLOPS_PER_S == pytest.approx(2.2, rel=0.05)
    without = sample_flops(json.loads(UNET.read_text()), Sampling(50, 1.0, 1024, 1024))
    assert without == pytest.approx(348e12, rel=0.01)


@needs_sdxl
def test_the_suites_of_the_seed_take_13_hours() -> None:
    """1.0 PartiPrompts + 2.0 HPD v2 + 0.3 Pick-a-Pic + 1.35 GenEval + 8.8 T2I-CompBench++ with its 30 steps."""
    unet = json.loads(UNET.read_text())
    seconds, images = 0.0, 0
    for each in BENCHMARKS:
        if each.label in GROUPS["seed@1"]:
            count = each.count * each.images_per_prompt
            sampling = Sampling(each.num_inference_steps, each.guidance_scale, each.resolution, each.resolution)
            seconds += count * sample_flops(unet, sampling) / REFERENCE_FLOPS_PER_S
            images += count
    assert images == 31_531
    assert seconds / 3600 == pytest.approx(13.45, rel=0.1)


def test_the_line_of_a_plan() -> None:
    assert cost_line(3956, 53.43) == "about 53.4 GPU hours on an H200 to draw, in 3,956 units"
    assert cost_line(1, 0.0004) == "about 0.0004 GPU hours on an H200 to draw, in 1 unit"
