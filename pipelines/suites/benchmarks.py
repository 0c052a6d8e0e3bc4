"""Protocols of public benchmarks: prompts by digest, sampling, judges and aggregation, pinned under a version.

A benchmark is data; its prompts are fetched (`mapo suites fetch`). Where two papers sample differently, the protocol
takes one way and `differs` says so. Numbers of one version can be compared, and those of two cannot.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pipelines.suites.compbench.words import without_adjectives
from pipelines.suites.derived import THREE_IN_ONE
from pipelines.suites.prompt_sets import COMPBENCH_CATEGORIES, PromptSet, SetRow, prompt_set
from pipelines.suites.questions import Questions
from pipelines.suites.subjects import SUBJECTS
from pipelines.suites.suite import Suite, SuitePrompt, numbered

SEEDS = "Noise follows from the run's seed, the prompt and the number of the image; the authors' seeds are not used."
SDXL_SIDE = 1024


@dataclass(frozen=True)
class Benchmark:
    """The protocol of a benchmark, without its prompts.

    Args:
        name: Its name.
        prompts: The name of its prompt set.
        count: Number of its rows.
        row: Makes a prompt of a row, or None for a row of another part of the set.
        about: What it measures and how, in a sentence.
        images_per_prompt: Images of each prompt.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance.
        scorers: Its judges.
        primary: Those that it makes claims about; by default all that run in process, or the foreign ones if none does.
        macro: Whether the score is the mean of the categories' means.
        differs: How it differs from what its authors publish.
        needs_questions: Whether its judges ask questions, which come as a file beside the prompts.
        subject: The subject whose images its own are compared with; None for no comparison.
        foreign: Its judges that run in environments of their own.
        derived: Its judges whose scores follow from those of the others.
        reads_without_adjectives: Whether a judge reads the prompts without their adjectives, which the file of
            questions tells.
        on_request: Whether it is in no group, because of what its prompts ask for.
        version: Version of the protocol.
    """

    name: str
    prompts: str
    count: int
    row: Callable[[SetRow], SuitePrompt | None]
    about: str
    images_per_prompt: int = 1
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    scorers: tuple[str, ...] = ()
    primary: tuple[str, ...] = ()
    macro: bool = False
    differs: tuple[str, ...] = (SEEDS,)
    needs_questions: bool = False
    subject: str | None = None
    foreign: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    reads_without_adjectives: bool = False
    on_request: bool = False
    version: int = 1

    @property
    def label(self) -> str:
        """Name and version."""
        return f"{self.name}@{self.version}"

    @property
    def set(self) -> PromptSet:
        """The prompt set."""
        return prompt_set(self.prompts)

    @property
    def resolution(self) -> int:
        """Side of the images, in pixels."""
        return SDXL_SIDE

    def suite(self, rows: Iterable[SetRow], questions: Questions | None = None, references: str | None = None) -> Suite:
        """Build the suite.

        Args:
            rows: All rows of the prompt set.
            questions: Questions about the images of its prompts, if its judges ask any.
            references: The images of its subject, as in `SuitePrompt`.

        Raises:
            SourceError: A prompt has no questions.
        """
        prompts = numbered(prompt for row in rows if (prompt := self.row(row)) is not None)
        parsed: tuple[str, ...] = ()
        if questions is not None:
            prompts = self._asked(prompts, questions)
            parsed = (f"Questions by {questions.parser}.",)
        if references is not None:
            prompts = tuple(dataclasses.replace(each, references=references) for each in prompts)
        return Suite(
            name=self.name,
            version=self.version,
            prompts=prompts,
            images_per_prompt=self.images_per_prompt,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            resolution=self.resolution,
            scorers=self.scorers,
            primary=self.primary or self.scorers or self.foreign,
            macro=self.macro,
            protocol=self.about,
            licence=self.set.licence,
            source=self.set.source,
            differs=(*self.differs, *parsed),
            foreign=self.foreign,
            derived=self.derived,
        )

    def _asked(self, prompts: Sequence[SuitePrompt], questions: Questions) -> tuple[SuitePrompt, ...]:
        """Return the prompts with what a parser found in them."""
        found = []
        for each, asked in zip(prompts, questions.column(each.prompt for each in prompts), strict=True):
            words = questions.words.get(each.prompt) if self.reads_without_adjectives else None
            text = None if words is None else json.dumps(without_adjectives(words), ensure_ascii=False)
            found.append(dataclasses.replace(each, questions=asked, without_adjectives=text))
        return tuple(found)


def _plain(row: SetRow) -> SuitePrompt:
    return SuitePrompt.of(row.prompt)


def _tagged(name: str) -> Callable[[SetRow], SuitePrompt]:
    return lambda row: SuitePrompt.of(row.prompt, str(row.metadata[name]))


def _geneval(row: SetRow) -> SuitePrompt:
    metadata = json.dumps(dict(row.metadata), ensure_ascii=False, sort_keys=True)
    return SuitePrompt.of(row.prompt, str(row.metadata["tag"]), metadata=metadata)


def _compbench(category: str) -> Callable[[SetRow], SuitePrompt | None]:
    def row_of(row: SetRow) -> SuitePrompt | None:
        if row.metadata["category"] != category:
            return None
        kind = row.metadata.get("kind")
        return SuitePrompt.of(row.prompt, *([str(kind)] if kind else []))

    return row_of


def _subject(subject: str) -> Callable[[SetRow], SuitePrompt | None]:
    def row_of(row: SetRow) -> SuitePrompt | None:
        if row.metadata["subject"] != subject:
            return None
        return SuitePrompt.of(str(row.metadata["plain"]), text=row.prompt)

    return row_of


def _i2p(row: SetRow) -> SuitePrompt:
    return SuitePrompt.of(row.prompt, *row.metadata["categories"])


DPO_SAMPLING = (
    "50 steps with guidance 5, as Diffusion-DPO samples SDXL; other papers use 7.5, or state nothing. " + SEEDS
)
PICK = Benchmark(
    name="pickapic-v2-test",
    prompts="pickapic-v2-test",
    count=487,
    row=_plain,
    about="The 487 distinct prompts of Pick-a-Pic v2's test_unique, one image each.",
    scorers=("pickscore",),
    differs=("The 500 rows of test_unique hold 13 repetitions, which are left out.", DPO_SAMPLING),
)
COMPBENCH_JUDGES: dict[str, tuple[str, ...]] = {
    "color": ("blip-vqa",),
    "shape": ("blip-vqa",),
    "texture": ("blip-vqa",),
    "non_spatial": ("clip-t",),
    "complex": ("blip-vqa", "compbench-clip-complex"),
}
"""The judges that run in process; the others are foreign detectors, whose scores are imported."""
COMPBENCH_FOREIGN = {
    "spatial": "compbench-2d",
    "3d_spatial": "compbench-3d",
    "numeracy": "compbench-numeracy",
    "complex": "compbench-2d-complex",
}
"""The names under which the scores of foreign detectors are imported."""
COMPBENCH_DERIVED = {"complex": (THREE_IN_ONE.name,)}
"""The judges that are merged from others."""
FOREIGN = (
    "Its detector runs in a container of its own (infra/compbench). `mapo scores import` brings its scores, `{}`; the "
    "suite is drawn without them, and waits for them."
)
MERGED = (
    "An image's score is the mean of the parts that the kind of its prompt has: `blip-vqa`, `compbench-2d-complex` for "
    "spatial relations, `compbench-clip-complex` for actions. The parts alone describe."
)


def _of_compbench(category: str) -> Benchmark:
    judges, foreign = COMPBENCH_JUDGES.get(category, ()), COMPBENCH_FOREIGN.get(category)
    derived = COMPBENCH_DERIVED.get(category, ())
    told = (*([FOREIGN.format(foreign)] if foreign else []), *([MERGED] if derived else []))
    steps = "10 images a prompt, 30 steps, the pipeline's usual guidance."
    return Benchmark(
        name=f"t2i-compbench-{category.replace('_', '-')}",
        prompts="t2i-compbench",
        count=300,
        row=_compbench(category),
        about=f"T2I-CompBench++, category {category}: 300 prompts, {steps}",
        images_per_prompt=10,
        num_inference_steps=30,
        scorers=judges,
        primary=derived,
        differs=(SEEDS, "The official code samples Stable Diffusion 2 with DDIM; here the model's own sampler.", *told),
        foreign=() if foreign is None else (foreign,),
        derived=derived,
        reads_without_adjectives="compbench-clip-complex" in judges,
        needs_questions="blip-vqa" in judges,
    )


COMPBENCH = tuple(_of_compbench(category) for category in COMPBENCH_CATEGORIES)
DREAMBENCH = tuple(
    Benchmark(
        name=f"dreambench-{subject.replace('_', '-')}",
        prompts="dreambench",
        count=25,
        row=_subject(subject),
        about=f"DreamBench, subject {subject}: 25 prompts, 4 images each, for a model that has learnt this subject.",
        images_per_prompt=4,
        scorers=("dino", "clip-i", "clip-t"),
        differs=(
            "The subject's word is `sks`; images are judged against the prompt without it.",
            "The authors' steps and guidance are of other models; here they are those of `evaluate`.",
            SEEDS,
        ),
        subject=subject,
    )
    for subject in SUBJECTS
)
BENCHMARKS = (
    PICK,
    Benchmark(
        name="hpdv2",
        prompts="hpdv2",
        count=3200,
        row=_tagged("style"),
        about="HPD v2's benchmark: 4 styles of 800 prompts, one image each.",
        scorers=("hpsv2.1", "aesthetic", "pickscore", "imagereward"),
        primary=("hpsv2.1",),
        differs=("Repeated prompts are drawn again, with other noise.", DPO_SAMPLING),
    ),
    Benchmark(
        name="partiprompts",
        prompts="partiprompts",
        count=1632,
        row=lambda row: SuitePrompt.of(row.prompt, str(row.metadata["category"]), str(row.metadata["challenge"])),
        about="PartiPrompts: 1,632 prompts in 12 categories and 11 challenges, one image each.",
        scorers=("imagereward", "aesthetic", "hpsv2.1"),
        primary=("imagereward", "aesthetic"),
        differs=(DPO_SAMPLING,),
    ),
    Benchmark(
        name="geneval",
        prompts="geneval",
        count=553,
        row=_geneval,
        about="GenEval: 553 prompts about objects, 4 images each; the mean of six tags.",
        images_per_prompt=4,
        guidance_scale=9.0,
        scorers=("geneval",),
        macro=True,
        differs=(
            "The detector is Meta's Mask2Former Swin-S instead of mmdetection's training of the same model.",
            SEEDS,
        ),
    ),
    *COMPBENCH,
    *DREAMBENCH,
    Benchmark(
        name="i2p",
        prompts="i2p",
        count=4703,
        row=_i2p,
        about="I2P: 4,703 prompts that ask for inappropriate images, 10 images each; the share that is inappropriate.",
        images_per_prompt=10,
        guidance_scale=7.5,
        scorers=("q16",),
        differs=(
            "The authors' seeds and guidance of each row are not used.",
            "Inappropriate means so by Q16 alone; the authors add NudeNet, whose licence is AGPL: name it as a scorer.",
        ),
        on_request=True,
    ),
    Benchmark(
        name="quick",
        prompts="pickapic-v2-test",
        count=487,
        row=_plain,
        about="A quick look: the prompts of pickapic-v2-test with four small judges.",
        scorers=("pickscore", "hpsv2.1", "imagereward", "aesthetic"),
        differs=PICK.differs,
    ),
)
"""Every benchmark, in the order of `mapo suites`."""
SEED = ("partiprompts@1", "pickapic-v2-test@1", "hpdv2@1", "geneval@1")
GROUPS = {
    "t2i-compbench@1": tuple(each.label for each in COMPBENCH),
    "dreambench@1": tuple(each.label for each in DREAMBENCH),
    "seed@1": (*SEED, *(each.label for each in COMPBENCH)),
}
"""Names that stand for several suites."""
FAMILIES = ("t2i-compbench@1", "dreambench@1")
"""Groups of suites that make up one benchmark."""
