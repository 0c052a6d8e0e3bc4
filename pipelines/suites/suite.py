"""A benchmark: prompts, the settings that its samples are drawn with, the scorers that judge them, and its protocol."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from pipelines.dataset.pair import prompt_id

REPEAT = "#"
"""Between the id of a prompt and the number of its repetition."""


@dataclass(frozen=True)
class SuitePrompt:
    """Prompt of a suite; the first of its tags is its category.

    Args:
        prompt_id: Its id in this suite: that of its samples, with REPEAT and a number where a benchmark has the prompt
            again, which then is judged on images of its own.
        prompt: The text that images are judged against.
        tags: Its tags.
        text: The text that images are drawn from; None for the prompt itself.
        metadata: What judges must know of it beside the text, as canonical JSON; None if there is nothing.
        questions: Questions about its images, as a JSON list of texts; None if there are none.
        references: Images that its own are compared with, as a JSON list of places (`shard`, `length`, `sha256`); None
            if there are none.
        without_adjectives: The prompt without its adjectives, as a JSON text; None if no parser has found them.
    """

    prompt_id: str
    prompt: str
    tags: tuple[str, ...] = ()
    text: str | None = None
    metadata: str | None = None
    questions: str | None = None
    references: str | None = None
    without_adjectives: str | None = None

    @staticmethod
    def of(prompt: str, *tags: str, **more: str | None) -> "SuitePrompt":
        """Return a prompt with the id that samples and scores know it by."""
        return SuitePrompt(prompt_id(prompt), prompt, tags, **more)

    @property
    def sample_id(self) -> str:
        """The prompt_id of its samples."""
        return self.prompt_id.partition(REPEAT)[0]

    @property
    def occurrence(self) -> int:
        """How many rows of the suite before this one have the same prompt."""
        return int(self.prompt_id.partition(REPEAT)[2] or 0)


def numbered(prompts: Iterable[SuitePrompt]) -> tuple[SuitePrompt, ...]:
    """Give repeated prompts of a benchmark ids of their own, so that every row counts once."""
    seen: Counter[str] = Counter()
    found = []
    for each in prompts:
        place = seen[each.prompt_id]
        seen[each.prompt_id] += 1
        found.append(dataclasses.replace(each, prompt_id=f"{each.prompt_id}{REPEAT}{place}") if place else each)
    return tuple(found)


@dataclass(frozen=True)
class Suite:
    """A named benchmark. It is data: who draws the samples and who scores them is decided elsewhere.

    Args:
        name: Its name in a configuration and in `results.json`.
        version: Version of its prompts and protocol; raise it when a number would mean something else.
        prompts: Its prompts, each once.
        images_per_prompt: Images of each prompt.
        num_inference_steps: Denoising steps of a sample.
        guidance_scale: Classifier-free guidance; 1 or less turns it off.
        resolution: Side of the square samples, in pixels; None for `encode.resolution`.
        scorers: Names of its scorers.
        primary: Names of the judges whose differences it makes claims about; Holm's correction is over these. The
            others describe.
        macro: Whether its score is the mean of the categories' means, as GenEval's, not the mean over prompts.
        protocol: What it measures and how, in words.
        licence: Licence of the prompts.
        source: Where the prompts come from.
        deviations: How this differs from the protocol, such as `4 steps instead of 30`; see `changed`.
        protocol_prompts: Number of prompts of the whole protocol; None for all of `prompts`.
        differs: How the protocol itself differs from what its authors publish, in sentences.
        foreign: Names of judges that run in environments of their own, whose scores are imported.
        derived: Names of judges whose scores follow from those of others; see `derived.DERIVED`.

    Raises:
        ValueError: There is no prompt, a prompt occurs twice, a number is out of range, a primary scorer is not among
            its judges, or `macro` is set and a prompt has no category.
    """

    name: str
    version: int
    prompts: tuple[SuitePrompt, ...]
    images_per_prompt: int = 1
    num_inference_steps: int = 30
    guidance_scale: float = 5.0
    resolution: int | None = None
    scorers: tuple[str, ...] = ()
    primary: tuple[str, ...] = ()
    macro: bool = False
    protocol: str = ""
    licence: str = ""
    source: str = ""
    deviations: tuple[str, ...] = ()
    protocol_prompts: int | None = None
    differs: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"suite {self.name}: there is no prompt.")
        counts = Counter(each.prompt_id for each in self.prompts)
        if len(counts) < len(self.prompts):
            twice = next(each.prompt for each in self.prompts if counts[each.prompt_id] > 1)
            repeated = len(self.prompts) - len(counts)
            raise ValueError(
                f"suite {self.name}: {repeated} of {len(self.prompts)} prompts are repeated, such as {twice!r}."
            )
        if min(self.images_per_prompt, self.num_inference_steps) < 1 or self.guidance_scale < 0:
            raise ValueError(
                f"suite {self.name}: {self.images_per_prompt} images a prompt, {self.num_inference_steps} steps and"
                f" guidance {self.guidance_scale:g}; these must be at least 1, 1 and 0."
            )
        if unknown := set(self.primary) - {*self.scorers, *self.foreign, *self.derived}:
            raise ValueError(f"suite {self.name}: the primary scorer {min(unknown)} is not one of its scorers.")
        if self.macro and self.strata is None:
            raise ValueError(f"suite {self.name}: a mean over categories needs a tag on each of its prompts.")

    @property
    def label(self) -> str:
        """Name and version, such as `starter@1`."""
        return f"{self.name}@{self.version}"

    @property
    def strata(self) -> dict[str, str] | None:
        """prompt_id -> category; None if a prompt has none."""
        if not all(each.tags for each in self.prompts):
            return None
        return {each.prompt_id: each.tags[0] for each in self.prompts}

    @property
    def tags(self) -> dict[str, tuple[str, ...]]:
        """Tag -> prompt_ids, in the order in which the prompts bring them up."""
        found: dict[str, list[str]] = {}
        for each in self.prompts:
            for tag in dict.fromkeys(each.tags):
                found.setdefault(tag, []).append(each.prompt_id)
        return {tag: tuple(members) for tag, members in found.items()}

    @property
    def sha256(self) -> str:
        """Digest of the prompts with their tags and all that is known of them, in order."""
        lines = [json.dumps(_parts(each), ensure_ascii=False) for each in self.prompts]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def changed(
        self,
        *,
        images_per_prompt: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        resolution: int | None = None,
    ) -> "Suite":
        """Return the suite with other settings, and with a word on each that is not the protocol's; None keeps it."""
        wanted = {
            "images_per_prompt": (images_per_prompt, "{:g} image{s} a prompt instead of {:g}"),
            "num_inference_steps": (num_inference_steps, "{:g} step{s} instead of {:g}"),
            "guidance_scale": (guidance_scale, "guidance {:g} instead of {:g}"),
            "resolution": (resolution, "{:g} pixels instead of {:g}"),
        }
        values, words = {}, list(self.deviations)
        for field, (value, sentence) in wanted.items():
            own = getattr(self, field)
            if value is None or value == own:
                continue
            values[field] = value
            if own is not None:
                words.append(sentence.format(value, own, s="" if value == 1 else "s"))
        return dataclasses.replace(self, **values, deviations=tuple(words))  # type: ignore[arg-type]

    def limited(self, limit: int | None, *, seed: int) -> "Suite":
        """Return the suite with so many of its prompts: a look, not the protocol.

        The choice follows from the seed and each prompt alone, so that a larger limit adds prompts and drops none.

        Args:
            limit: Number of prompts; None, or as many as there are, keeps all.
            seed: Seed of the choice.
        """
        if limit is None or limit >= len(self.prompts):
            return self

        def place(prompt: SuitePrompt) -> str:
            return hashlib.sha256(f"{seed}:{prompt.prompt_id}".encode()).hexdigest()

        chosen = set(sorted(self.prompts, key=place)[:limit])
        whole = self.protocol_prompts or len(self.prompts)
        return dataclasses.replace(
            self,
            prompts=tuple(each for each in self.prompts if each in chosen),
            deviations=(*self.deviations, f"{limit:,} of {whole:,} prompts"),
            protocol_prompts=whole,
        )

    def with_scorers(self, scorers: Iterable[str]) -> "Suite":
        """Return the suite with further scorers; they are the primary ones of a suite that declares none."""
        own = dict.fromkeys((*self.scorers, *scorers))
        added = tuple(each for each in own if each not in self.scorers)
        return dataclasses.replace(self, scorers=tuple(own), primary=self.primary or added)


def _parts(prompt: SuitePrompt) -> list[object]:
    """Return what a digest is of; what a prompt does not have is left out."""
    names = ("text", "metadata", "questions", "without_adjectives")
    more: dict[str, object] = {name: getattr(prompt, name) for name in names}
    if prompt.references is not None:
        more["references"] = [each["sha256"] for each in json.loads(prompt.references)]
    told = {name: value for name, value in more.items() if value is not None}
    return [prompt.prompt, list(prompt.tags), *([told] if told else [])]
