"""A grade by a vision-language model on a server, after a rubric that is stated."""

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from pipelines.dataset.config import Config
from pipelines.dataset.errors import ConfigError, ModelError
from pipelines.dataset.values import JsonObject
from pipelines.scores.scorers.batch import Batch
from pipelines.scores.scorers.chat import Answer, Chat, Server, check_url, told
from pipelines.scores.scorers.images import Picture
from pipelines.scores.scorers.result import Failure, Result, Score
from pipelines.scores.scorers.scorer import BuiltIn

URL_VARIABLE, MODEL_VARIABLE, KEY_VARIABLE = "MAPO_VLM_URL", "MAPO_VLM_MODEL", "MAPO_VLM_API_KEY"
RUBRIC = (
    "You are given an image that was made for this prompt: {prompt}\n"
    "Grade how well the image shows what the prompt says, and how well it is made, from {lowest} (worst) to {highest} "
    "(best). Say briefly why. End with one line of this form:\nFinal Score: N"
)
QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
SLASH = r"[ \t]*(?:/|\u2044|out[ ]of)[ \t]*"
CLAIM = re.compile(
    r"final\s+score(?:\W{0,4}\([^()\n]{1,40}\)(?:\W{0,4}[:=\u2013-]|\s+is\b))?(?:\s+(?:is|of)\b)?[\W_]{0,8}?"
    rf"(-?\d\S*(?:(?:{SLASH}|[ \t]*[\u2013-][ \t]*)\d\S*)?)",
    re.IGNORECASE,
)
"""What stands where a grade does, perhaps after the range in brackets: `4`, `4/5`, but also `3-4` or `4th`."""
GRADE = re.compile(rf"(-?\d+(?:\.\d+)?)(?:{SLASH}(\d+(?:\.\d+)?))?[\W_]*", re.IGNORECASE)
"""A grade, and what it is out of."""
ROUNDING = 0.01
"""By how much probabilities of a server that computes in bfloat16 may exceed 1."""
NUM_LIKELIEST = 20
"""First tokens that a server is asked for; no public server gives more."""


class GradedVlmOptions(Config):
    """Options of the scorer `graded_vlm`."""

    url: str = Field(min_length=1)
    """Base of the server's API, such as http://HOST:8000/v1; by default the variable MAPO_VLM_URL."""
    model: str = Field(min_length=1)
    """The model's name on the server; by default the variable MAPO_VLM_MODEL."""
    answer: Literal["grade", "p_yes"] = "grade"
    """`grade` reads "Final Score: N" from the text; `p_yes` is the probability that the first word is yes."""
    rubric: str | None = None
    """The text that follows the image, with {prompt}, and {lowest} and {highest} of a grade; None for a default."""
    lowest: float = 1.0
    """The lowest grade."""
    highest: float = 5.0
    """The highest grade."""
    max_tokens: int = Field(512, ge=1)
    """Most tokens of a graded answer."""
    key_variable: str = KEY_VARIABLE
    """The environment variable that holds the server's key."""
    timeout_s: float = Field(120.0, gt=0)
    """Longest time of one request."""
    max_retries: int = Field(4, ge=0, le=10)
    """Further tries after HTTP 429 and 5xx and broken connections, with growing pauses."""
    concurrency: int = Field(8, ge=1, le=256)
    """Most requests at once, from each scoring actor."""

    @model_validator(mode="after")
    def _range_and_rubric_fit(self) -> Self:
        """Check that grades have a range, and that the rubric has no unknown placeholders."""
        if not self.lowest < self.highest:
            raise ValueError(f"`lowest` is {self.lowest:g}, which must be below `highest`, {self.highest:g}")
        unknown = set(re.findall(r"\{(\w+)\}", self.text)) - {"prompt", "lowest", "highest"}
        if unknown:
            raise ValueError(
                f"the rubric has {', '.join(sorted(unknown))} in braces; it may have prompt, lowest, highest"
            )
        return self

    @property
    def text(self) -> str:
        """The text that follows the image, before its placeholders are filled."""
        if self.rubric is not None:
            return self.rubric
        return RUBRIC if self.answer == "grade" else QUESTION

    def filled(self, prompt: str) -> str:
        """Return the text for one prompt, whose own braces stay as they are."""
        values = {"prompt": prompt, "lowest": f"{self.lowest:g}", "highest": f"{self.highest:g}"}
        return re.sub(r"\{(prompt|lowest|highest)\}", lambda found: values[found[1]], self.text)


class GradedVlm(BuiltIn):
    """Grade of a vision-language model behind an OpenAI-compatible server, at temperature 0.

    score = N of the last "Final Score: N" in the answer, or with `answer: p_yes` the summed probability of all
    spellings of yes among the likeliest first tokens. An answer without a grade, a refusal, or a grade out of range is
    a failure. A server that does not answer leaves the image unanswered, and a rerun asks again.
    """

    name: ClassVar[str] = "graded_vlm"
    description: ClassVar[str] = (
        "What grade does a vision-language model of your choice give, after a stated rubric? "
        "(not verified against a published value)"
    )
    scale: ClassVar[str] = "grade, 1 to 5 unless `lowest` and `highest` say otherwise; or probability, 0 to 1"
    licence: ClassVar[str] = "that of the model on the server"

    version: ClassVar[str] = "2"
    has_foreign_model: ClassVar[bool] = True

    def __init__(self) -> None:
        self._options: GradedVlmOptions | None = None
        self._chat: Chat | None = None

    def configure(self, options: Mapping[str, Any]) -> None:
        """Take the options; the scorer's name then carries the model's.

        Raises:
            ConfigError: An option is unknown, missing or impossible.
        """
        self._options = _options_of(options)
        object.__setattr__(self, "name", f"graded_vlm-{self._options.model.rpartition('/')[2]}")  # of this one alone
        self._chat = None

    @property
    def options(self) -> GradedVlmOptions:
        """The options.

        Raises:
            ConfigError: It has none yet.
        """
        if self._options is None:
            self.configure({})
        assert self._options is not None
        return self._options

    def shaping(self, digests: Mapping[str, str]) -> JsonObject:
        """Return everything that shapes a score: the server, its model and the text, but never the key."""
        names = ("url", "model", "answer", "lowest", "highest", "max_tokens")
        given = {name: getattr(self.options, name) for name in names}
        return {**super().shaping(digests), **given, "text": self.options.text, "dtype": "the server's"}

    def _results(self, batch: Batch) -> Sequence[Result]:
        options, failures = self.options, batch.failures(self.needs)
        if self._chat is None:
            server = {name: getattr(options, name) for name in Server.__dataclass_fields__}
            self._chat = Chat(Server(**server))
        rows = [row for row in range(len(batch)) if row not in failures]
        with ThreadPoolExecutor(options.concurrency, "graded-vlm") as threads:
            found = threads.map(lambda row: self._of(batch.pictures[row], str(batch.prompts[row])), rows)
            results: dict[int, Result] = dict(zip(rows, found, strict=True))
        return [failures.get(row) or results[row] for row in range(len(batch))]

    def _of(self, picture: Picture, prompt: str) -> Result:
        assert self._chat is not None
        png, options = png_of(picture), self.options
        if options.answer == "grade":
            answer = self._chat.ask(png, options.filled(prompt), max_tokens=options.max_tokens)
            return answer if isinstance(answer, Failure) else grade_of(answer, options.lowest, options.highest)
        asked = {"max_tokens": 1, "logprobs": True, "top_logprobs": NUM_LIKELIEST}
        answer = self._chat.ask(png, options.filled(prompt), **asked)
        return answer if isinstance(answer, Failure) else probability_of_yes(answer, options.url)


def _options_of(options: Mapping[str, Any]) -> GradedVlmOptions:
    """Check options, of which URL and model may come from the environment."""
    variables = {"url": os.environ.get(URL_VARIABLE), "model": os.environ.get(MODEL_VARIABLE)}
    try:
        found = GradedVlmOptions.model_validate({**{name: each for name, each in variables.items() if each}, **options})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        hint = "see `mapo scorers graded_vlm` and the guide on evaluation"
        if place in variables:
            hint = f"set `options: {{{place}: ...}}` of the scorer, or {URL_VARIABLE} and {MODEL_VARIABLE}"
        raise ConfigError(f"options of graded_vlm: {place or 'all'}: {first['msg']}", hint) from error
    check_url(found.url)
    return found


def png_of(picture: Picture) -> bytes:
    """Return an image as a PNG, which is lossless."""
    picture.rgb.save(out := io.BytesIO(), "PNG", compress_level=1)
    return out.getvalue()


def grade_of(answer: Answer, lowest: float, highest: float) -> Result:
    """Return the last grade in an answer; a failure without one in range."""
    claims = CLAIM.findall(answer.text)
    if not claims or (answer.is_cut and answer.text.endswith(claims[-1])):  # 1 may be the beginning of 10
        cut = " and was cut off" if answer.is_cut else ""
        return Failure(f'the answer has no "Final Score: N"{cut}: {told(answer.text)!r}')
    found = GRADE.fullmatch(claims[-1])
    if found is None or (found[2] is not None and float(found[2]) != highest):
        return Failure(f"{told(claims[-1])!r} is no grade up to {highest:g}: {told(answer.text)!r}")
    grade = float(found[1])
    if not lowest <= grade <= highest:
        return Failure(f"the grade {grade:g} is not in {lowest:g}..{highest:g}: {told(answer.text)!r}")
    return Score(grade, {"num_grades": float(len(claims))})


def probability_of_yes(answer: Answer, url: str) -> Result:
    """Return the probability that the first token is a spelling of yes; component `no` that of no.

    Raises:
        ModelError: The server gives no log-probabilities.
    """
    if answer.first_tokens is None:
        raise ModelError(
            f"the server {url} gives no log-probabilities, so there is no probability of yes",
            "use `answer: grade`, or a server that gives `top_logprobs`, as vLLM does",
        )
    yes, no = (_probability(answer.first_tokens, word) for word in ("yes", "no"))
    if yes + no == 0.0:
        return Failure(f"neither yes nor no is among the {len(answer.first_tokens)} likeliest first tokens")
    if not yes + no <= 1 + ROUNDING:  # NaN is not, either
        return Failure(f"the server's probabilities of yes and no sum to {yes + no:.4g}")
    return Score(min(yes, 1.0), {"no": min(no, 1.0)})


def _probability(tokens: Sequence[tuple[str, float]], word: str) -> float:
    return math.fsum(
        math.exp(min(logprob, 1.0)) for token, logprob in tokens if token.strip().strip('."*').lower() == word
    )
