"""Results of an evaluation: records of means, differences and failures, and their JSON in `results.json`.

Numbers that do not exist are None, such as the mean of a scorer that failed everywhere; they are never 0 or NaN.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.suites.plain import fields_from, fields_of, from_plain, to_plain

RESULTS_VERSION = 1
TAGS = "tags"
"""Key beside the scorers of a model in `results.json`; no scorer can have this name."""
VOTES = "votes"
"""Key of the votes of people beside the scorers of a comparison, and their name among `evaluate.scorers`; no scorer can
have this name."""


@dataclass(frozen=True)
class Judge:
    """A scorer, as far as readers of its numbers must know it.

    Args:
        scale: Unit and usual range.
        higher_is_better: Direction in which a model wins.
        licence: Licence of its weights.
        description: What it measures.
        verified: Whether it has reproduced a published value on this storage or machine; None if it has nothing to
            verify, such as a statistic of pixels.
    """

    scale: str = ""
    higher_is_better: bool = True
    licence: str = ""
    description: str = ""
    verified: bool | None = None


@dataclass(frozen=True)
class ModelScore:
    """One scorer's numbers of one model; the interval is the mean's, at 95 %."""

    mean: float | None
    median: float | None
    low: float | None
    high: float | None
    n: int
    """Number of prompts."""
    median_low: float | None = None
    median_high: float | None = None
    num_images: int = 0
    """Number of images that have a score."""
    num_failed: int = 0
    """Number of images that have none."""


@dataclass(frozen=True)
class TagScore:
    """Mean over the prompts of one tag, with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int
    """Number of prompts."""


@dataclass(frozen=True)
class ModelResult:
    """Scores of one model by scorer, and by tag and scorer."""

    scores: Mapping[str, ModelScore]
    tags: Mapping[str, Mapping[str, TagScore]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the scorers, and beside them `tags`."""
        return {**to_plain(self.scores), TAGS: to_plain(self.tags)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "ModelResult":
        """Return the scores that `to_json` wrote."""
        scores = {name: from_plain(ModelScore, each) for name, each in data.items() if name != TAGS}
        tags = {
            tag: {name: from_plain(TagScore, each) for name, each in found.items()}
            for tag, found in data.get(TAGS, {}).items()
        }
        return ModelResult(scores, tags)


@dataclass(frozen=True)
class TagDifference:
    """Mean difference over the prompts of one tag, with its 95 % interval."""

    difference: float
    low: float
    high: float
    n: int
    """Number of prompts."""


@dataclass(frozen=True)
class VoteCount:
    """Votes of people on pairs of images."""

    num_votes: int
    num_voters: int
    """Number of sessions that they come from."""


@dataclass(frozen=True)
class SuiteVotes:
    """Votes of people on the images of a suite.

    Args:
        num_votes: Number of votes that count.
        num_voters: Number of sessions that they come from.
        left_out: Number of votes on this suite that do not count, by reason.
    """

    num_votes: int
    num_voters: int
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """One scorer's difference between a model and the one that it is compared with, on the prompts that both have.

    Args:
        difference: Mean of model minus the other model, whichever direction is better.
        low: End of its 95 % interval.
        high: The other end.
        win_rate: Share of prompts on which the model is better, ties counting half.
        win_low: End of its 95 % interval.
        win_high: The other end.
        ties: Number of prompts on which the two differ by no more than `tolerance`.
        n: Number of prompts that both have.
        wins: Prompts on which the model is better.
        losses: Prompts on which it is worse.
        num_left_out: Prompts that only one of the two, or neither, has a value of.
        p_value: Two-sided, for no difference.
        win_p_value: Two-sided sign test.
        p_holm: `p_value` after Holm's correction over the suite's primary scorers and all models but checkpoints; None
            for others.
        detectable: The smallest true difference that 80 % of such runs would show.
        tolerance: In the scorer's unit.
        words: The difference as a sentence.
        tags: Difference by tag.
        votes: Number of votes and voters behind it; None for a scorer.
    """

    difference: float | None
    low: float | None
    high: float | None
    win_rate: float | None
    win_low: float | None
    win_high: float | None
    ties: int
    n: int = 0
    wins: int = 0
    losses: int = 0
    num_left_out: int = 0
    p_value: float | None = None
    win_p_value: float | None = None
    p_holm: float | None = None
    detectable: float | None = None
    tolerance: float = 0.0
    words: str = ""
    tags: Mapping[str, TagDifference] = field(default_factory=dict)
    votes: VoteCount | None = None

    @property
    def is_shown(self) -> bool:
        """Whether there is a difference at 95 %: for a primary scorer after Holm's correction."""
        p_value = self.p_value if self.p_holm is None else self.p_holm
        return p_value is not None and p_value < 0.05


@dataclass(frozen=True)
class CutPrompts:
    """Prompts that are longer than a scorer reads."""

    prompt_ratio: float
    """Share of the prompts that are cut, 0..1."""
    token_ratio: float
    """Mean share of a prompt's tokens that are cut, over all prompts, 0..1."""


@dataclass(frozen=True)
class MissingJudge:
    """A judge of a suite that has no numbers, because not every image has its score.

    A mean over a part of the images would be of another protocol.

    Args:
        name: Its name.
        why: Why it has none, as a clause.
        hint: What brings its scores.
        num_missing: Number of images without its score.
        num_images: Number of images of the suite, over all models; the same image counts once.
        scorer: Its name in a configuration.
        num_imported: Number of scores that were imported for it, whichever images they are of; when there are more, the
            evaluation is not up to date.
    """

    name: str
    why: str
    hint: str
    num_missing: int
    num_images: int
    scorer: str = ""
    num_imported: int = 0

    @property
    def words(self) -> str:
        """What is missing, and what to do, as a sentence."""
        return f"no numbers of {self.name}: {self.why}" + (f"; {self.hint}" if self.hint else "")


@dataclass(frozen=True)
class SuiteResult:
    """Results of one suite.

    Args:
        protocol: Name, version and deviations of what was run.
        num_prompts: Number of prompts that were judged.
        images_per_prompt: Images of each prompt.
        models: Scores by model.
        against: Comparisons by model and scorer.
        against_model: The model that is compared with.
        scorers: The scorers, in order.
        primary: Those that Holm's correction is over.
        num_primary_tests: Number of comparisons that it is over.
        tags: Number of prompts by tag.
        failures: Number of images without a score, by model, scorer and reason.
        cut: Prompts that are longer than a scorer reads, by scorer.
        num_inference_steps: Denoising steps of a sample.
        guidance_scale: Classifier-free guidance.
        resolution: Side of the samples in pixels; None if the suite leaves it to `encode.resolution`.
        protocol_prompts: Number of prompts of the whole protocol.
        deviations: How the run differs from the protocol.
        about: What the suite measures, in words.
        licence: Licence of the prompts.
        source: Where they come from.
        prompts_sha256: Digest of the prompts.
        seed: Seed of the bootstrap.
        leaked_prompts: Number of prompts that the run's model was trained on; None if it is not known, or the run has
            no training.
        votes: The votes of people on its images; None if they are not asked for.
        missing: Its judges that have no numbers yet.
    """

    protocol: str
    num_prompts: int
    images_per_prompt: int
    models: Mapping[str, ModelResult]
    against: Mapping[str, Mapping[str, Comparison]]
    against_model: str = ""
    scorers: tuple[str, ...] = ()
    primary: tuple[str, ...] = ()
    num_primary_tests: int = 0
    tags: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    cut: Mapping[str, CutPrompts] = field(default_factory=dict)
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    resolution: int | None = None
    protocol_prompts: int | None = None
    deviations: tuple[str, ...] = ()
    about: str = ""
    licence: str = ""
    source: str = ""
    prompts_sha256: str = ""
    seed: int = 0
    leaked_prompts: int | None = None
    votes: SuiteVotes | None = None
    missing: tuple[MissingJudge, ...] = ()


@dataclass(frozen=True)
class Results:
    """Content of `results.json`."""

    suites: Mapping[str, SuiteResult]

    def to_json(self) -> dict[str, Any]:
        """Return plain data; every number in it is finite."""
        return {"version": RESULTS_VERSION, **fields_of(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Results":
        """Return the results in `results.json`; fields of later versions are ignored.

        Raises:
            ValueError: A field is missing, or has the wrong shape.
        """
        return fields_from(Results, data)
