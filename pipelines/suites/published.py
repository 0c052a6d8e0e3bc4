"""Published numbers of SDXL, DPO-SDXL and MaPO, each with its source, its metric and what is known of its protocol.

They are for reading beside a run's own numbers and are never mixed with them: for the same SDXL, papers print
PickScores from 21.95 to 22.75, which is more than any method gains. Only models of one table, drawn and scored by one
protocol, compare.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.suites.results import Results

SDXL, DPO, MAPO = "SDXL", "DPO-SDXL", "MaPO"


@dataclass(frozen=True)
class PublishedTable:
    """Numbers of one source, as it prints them.

    Args:
        source: Paper, model card or repository, and the place in it.
        prompts: The prompts that were drawn.
        metrics: Names of the metrics, as the source calls them.
        values: Model -> one value for each metric; None where the source has none.
        protocol: How the numbers were made, and what the source leaves open.
        scorers: Names of our scorers that measure the same kind of thing; not by the same protocol.
        suites: Names of our suites with the same prompts, or what such names begin with.
        address: Where to read it.
    """

    source: str
    prompts: str
    metrics: tuple[str, ...]
    values: Mapping[str, tuple[float | None, ...]]
    protocol: str
    scorers: tuple[str, ...] = ()
    suites: tuple[str, ...] = ()
    address: str = ""


PREFERENCE_SCORERS = ("aesthetic", "hpsv2.1", "hpsv2", "pickscore", "imagereward")

PUBLISHED = (
    PublishedTable(
        source="MaPO paper, version 2, Table 2",
        prompts="Pick-a-Pic v2, test",
        metrics=("Aesthetic", "HPSv2.1", "PickScore"),
        values={SDXL: (6.03, 30.0, 22.4), DPO: (6.03, 31.1, 22.9), MAPO: (6.34, 31.2, 22.9)},
        protocol="Steps, guidance and seeds are not stated; HPSv2.1 and PickScore as 100 cos. No intervals.",
        scorers=PREFERENCE_SCORERS,
        suites=("pickapic-v2-test",),
        address="https://arxiv.org/abs/2406.06424v2",
    ),
    PublishedTable(
        source="Model card of mapo-t2i/mapo-beta",
        prompts="Presumably those of Table 2",
        metrics=("Aesthetic", "HPSv2.1", "PickScore"),
        values={DPO: (6.03, 31.1, 22.7), MAPO: (6.17, 31.2, 22.5)},
        protocol=(
            "The released weights, which are those of the paper's version 1: other numbers than Table 2 of version 2."
            " The authors' README draws with 30 steps at the pipeline's guidance, 5."
        ),
        scorers=PREFERENCE_SCORERS,
        suites=("pickapic-v2-test",),
        address="https://huggingface.co/mapo-t2i/mapo-beta",
    ),
    PublishedTable(
        source="SmPO paper",
        prompts="HPD v2, test",
        metrics=("PickScore", "HPSv2.1", "ImageReward", "Aesthetic"),
        values={
            SDXL: (22.75, 28.45, 0.881, 6.114),
            DPO: (23.13, 30.06, 1.184, 6.112),
            MAPO: (22.81, 29.11, 1.224, 6.309),
        },
        protocol="Medians, not means; sampling is not known to us.",
        scorers=PREFERENCE_SCORERS,
        suites=("hpdv2",),
    ),
    PublishedTable(
        source="SPO paper",
        prompts="Pick-a-Pic, 500 prompts",
        metrics=("PickScore", "HPSv2", "ImageReward", "Aesthetic"),
        values={
            SDXL: (21.95, 26.95, 0.538, 5.950),
            DPO: (22.64, 29.31, 0.9436, 6.015),
            MAPO: (22.11, 28.22, 0.7165, 6.096),
        },
        protocol="Sampling and the version of HPSv2 are not known to us.",
        scorers=PREFERENCE_SCORERS,
        suites=("pickapic-v2-test",),
    ),
    PublishedTable(
        source="RankDPO paper",
        prompts="DPG-Bench",
        metrics=("DSG", "VQAScore", "Q-Align"),
        values={SDXL: (74.65, 84.33, 0.72), DPO: (76.74, 85.67, 0.74), MAPO: (74.53, 84.54, 0.80)},
        protocol="The benchmark has 1,065 long prompts; sampling is not known to us.",
        suites=("dpg-bench",),
    ),
    PublishedTable(
        source="GenEval paper",
        prompts="GenEval, 553 prompts",
        metrics=("mean", "single object", "two objects", "counting", "colours", "position", "attributes"),
        values={SDXL: (0.55, 0.98, 0.74, 0.39, 0.85, 0.15, 0.23)},
        protocol="50 steps, guidance 9, four images a prompt; judged by mmdet's Mask2Former and CLIP ViT-L/14.",
        scorers=("geneval",),
        suites=("geneval",),
        address="https://github.com/djghosh13/geneval",
    ),
    PublishedTable(
        source="RankDPO paper",
        prompts="T2I-CompBench",
        metrics=("colour", "shape", "texture", "spatial", "non-spatial", "complex"),
        values={SDXL: (58.79, 46.87, 52.99, 21.31, 31.19, 32.37)},
        protocol="Times 100. The benchmark asks for ten images a prompt and 30 steps; the sampling is not known to us.",
        suites=("t2i-compbench",),
    ),
    PublishedTable(
        source="t2v_metrics",
        prompts="GenAI-Bench",
        metrics=("VQAScore, basic", "advanced", "overall"),
        values={SDXL: (0.82, 0.63, 0.72)},
        protocol="Judged by CLIP-FlanT5-XXL.",
        suites=("genai-bench",),
    ),
)
"""What was published. Nothing was found for DPO-SDXL or MaPO on GenEval 2, HPSv3, OneIG, WISE or I2P."""


def published_beside(results: Results) -> tuple[PublishedTable, ...]:
    """Return the published tables that share a scorer or a suite with results, in the order of PUBLISHED."""
    suites = {result.protocol.partition("@")[0] for result in results.suites.values()}
    scorers = {scorer for result in results.suites.values() for scorer in result.scorers}

    def is_beside(table: PublishedTable) -> bool:
        has_suite = any(name == own or name.startswith(f"{own}-") for name in suites for own in table.suites)
        return has_suite or not scorers.isdisjoint(table.scorers)

    return tuple(each for each in PUBLISHED if is_beside(each))
