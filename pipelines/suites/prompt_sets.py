"""Prompt sets of public benchmarks: what they hold by digest, where they are published, and how their files are read.

mapo ships none of them. `mapo suites fetch` brings one from its public place or from a folder, as `mapo scorers fetch`
brings weights. A set is known by the digest of its parsed rows, not of a file: every layout in which it is published
gives the same rows. Light: needs neither ray nor torch.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.dataset.errors import ConfigError, ModelError
from pipelines.suites.subjects import read_subjects

Files = Mapping[str, bytes]
"""Content of each file of a layout by name."""
PARTI = "https://github.com/google-research/parti/raw/5a65797/"
GENEVAL = "https://raw.githubusercontent.com/djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f/prompts/"
COMPBENCH = (
    "https://raw.githubusercontent.com/Karine-Huang/T2I-CompBench/1b7094991a57f3c22abdd4f6e8ba6c1a15517073/"
    "examples/dataset/"
)
SDPO = "https://raw.githubusercontent.com/AIDC-AI/Diffusion-SDPO/84fb241c1b89705a247da8b0d6047798ca49830d/prompts/"
HPD = "https://huggingface.co/datasets/zhwang/HPDv2/resolve/main/benchmark/"
DREAMBOOTH = "https://github.com/google/dreambooth/raw/4f887af/dataset/"
I2P = "https://huggingface.co/api/datasets/AIML-TUDA/i2p/parquet/default/train/"
HPD_STYLES = ("anime", "concept-art", "paintings", "photo")
HPD_ROWS_A_STYLE = 800
COMPBENCH_CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
COMPBENCH_KINDS = ("spatial", "action", "spatialaction")
"""Kinds of complex prompts: which evaluators they get beside the attributes."""


@dataclass(frozen=True)
class SetRow:
    """A row of a prompt set: the prompt exactly as it is published, and what its judges need to know.

    Raises:
        ValueError: The prompt is no text, or has characters that UTF-8 cannot write.
    """

    prompt: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise ValueError(f"a prompt is {self.prompt!r}, not a text")
        self.line().encode()

    def line(self) -> str:
        """Return the canonical JSON line."""
        return json.dumps({**self.metadata, "prompt": self.prompt}, ensure_ascii=False, sort_keys=True)


@dataclass(frozen=True)
class Layout:
    """One way in which a set is published.

    Args:
        files: Names of its files.
        read: Makes rows of their content; raises ValueError, KeyError, TypeError, AttributeError or an Arrow error for
            another file.
        url: Beginning of the URL of each file; None if this layout is nowhere on the network.
    """

    files: tuple[str, ...]
    read: Callable[[Files], Iterable[SetRow]]
    url: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """A prompt set of a public benchmark.

    Args:
        name: Its name.
        count: Number of rows.
        sha256: Digest of the rows, from `digest_of`; None where it was never seen, so that the number of rows is all
            that is checked.
        licence: Its licence.
        source: Who published it, with the commit that was read.
        layouts: How it is published; those with a URL are fetched in this order.
    """

    name: str
    count: int
    sha256: str | None
    licence: str
    source: str
    layouts: tuple[Layout, ...]


def canonical(rows: Iterable[SetRow]) -> bytes:
    """Return the rows as JSON lines in UTF-8, of which the digest is taken."""
    return "".join(f"{row.line()}\n" for row in rows).encode()


def digest_of(rows: Iterable[SetRow]) -> str:
    """Return the sha256 of the canonical JSON lines."""
    return hashlib.sha256(canonical(rows)).hexdigest()


def read_canonical(data: bytes) -> tuple[SetRow, ...]:
    """Return the rows that `canonical` wrote.

    Raises:
        ModelError: A line is damaged.
    """
    found = []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
        try:
            metadata = _json(line)
            found.append(SetRow(metadata.pop("prompt"), metadata))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"the fetched prompts are damaged: line {number} is none of theirs",
                "fetch them again: mapo suites fetch NAME",
            ) from error
    return tuple(found)


def prompt_set(name: str) -> PromptSet:
    """Return a set by its name.

    Raises:
        ConfigError: There is no such set.
    """
    if name not in PROMPT_SETS:
        raise ConfigError(f"there is no prompt set {name}", f"choose from {', '.join(PROMPT_SETS)}")
    return PROMPT_SETS[name]


def _json(data: str | bytes) -> Any:
    """Parse JSON; nested too deeply is as wrong as any other error of it.

    Raises:
        ValueError: It is not valid JSON.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def _table(data: bytes, **form: Any) -> list[dict[str, Any]]:
    """Read a table of text whose first line names the columns.

    Raises:
        ValueError: It is not one.
    """
    try:
        return list(csv.DictReader(io.StringIO(data.decode(), newline=""), **form))
    except csv.Error as error:
        raise ValueError(str(error)) from error


def _lines(data: bytes) -> list[str]:
    """Return the lines that are not empty; line ends may be those of any system."""
    return [line for each in data.decode().split("\n") if (line := each.removesuffix("\r")).strip()]


def _json_lines(data: bytes) -> list[dict[str, Any]]:
    return [_json(line) for line in _lines(data)]


def _read_parti(files: Files) -> list[SetRow]:
    (data,) = files.values()
    rows = _table(data, delimiter="\t", quoting=csv.QUOTE_NONE)
    return [SetRow(row["Prompt"], {"category": row["Category"], "challenge": row["Challenge"]}) for row in rows]


def _read_geneval(files: Files) -> list[SetRow]:
    (data,) = files.values()
    names = ("tag", "include", "exclude")
    return [SetRow(row["prompt"], {name: row[name] for name in names if name in row}) for row in _json_lines(data)]


def _read_compbench(files: Files) -> list[SetRow]:
    kinds = {prompt.strip(): kind for kind in COMPBENCH_KINDS for prompt in _lines(files[f"complex_val_{kind}.txt"])}
    found = []
    for category in COMPBENCH_CATEGORIES:
        for prompt in _lines(files[f"{category}_val.txt"]):
            told = {"kind": kinds[prompt.strip()]} if category == "complex" else {}
            found.append(SetRow(prompt.strip(), {"category": category, **told}))
    return found


def _read_hpd_lines(files: Files) -> list[SetRow]:
    (data,) = files.values()
    return [SetRow(row["prompt"], {"style": row["style"]}) for row in _json_lines(data)]


def _read_hpd_sdpo(files: Files) -> list[SetRow]:
    """Read the list of all prompts, whose styles follow from their places."""
    (data,) = files.values()
    rows = _json(data)
    return [SetRow(row["prompt"], {"style": HPD_STYLES[place // HPD_ROWS_A_STYLE]}) for place, row in enumerate(rows)]


def _read_hpd(files: Files) -> list[SetRow]:
    """Read the publisher's files: one list of texts for each style."""
    return [SetRow(prompt, {"style": style}) for style in HPD_STYLES for prompt in _json(files[f"{style}.json"])]


def _read_prompt_lines(files: Files) -> list[SetRow]:
    (data,) = files.values()
    return [SetRow(row["prompt"]) for row in _json_lines(data)]


def _read_prompt_list(files: Files) -> list[SetRow]:
    (data,) = files.values()
    return [SetRow(row["prompt"]) for row in _json(data)]


def _read_dreambooth(files: Files) -> list[SetRow]:
    (data,) = files.values()
    return [SetRow(prompt, metadata) for prompt, metadata in read_subjects(data.decode())]


def _read_i2p(files: Files) -> list[SetRow]:
    """Read the table of I2P; `categories` is a text with commas."""
    ((name, data),) = files.items()
    if name.endswith(".parquet"):
        rows = pq.read_table(pa.BufferReader(data), columns=["prompt", "categories"]).to_pylist()
    else:
        rows = _table(data)
    return [SetRow(row["prompt"], {"categories": _listed(row["categories"])}) for row in rows]


def _listed(text: str) -> list[str]:
    return [name for each in text.split(",") if (name := each.strip())]


def _sets(*sets: PromptSet) -> dict[str, PromptSet]:
    return {each.name: each for each in sets}


COMPBENCH_FILES = (
    *(f"{each}_val.txt" for each in COMPBENCH_CATEGORIES),
    *(f"complex_val_{each}.txt" for each in COMPBENCH_KINDS),
)
PROMPT_SETS = _sets(
    PromptSet(
        name="partiprompts",
        count=1632,
        sha256="039f0bee53a4a5d990e5b76c7f89721c9df3b40d857773b37aa2224faad59b6c",
        licence="Apache-2.0",
        source="google-research/parti, commit 5a65797",
        layouts=(Layout(("PartiPrompts.tsv",), _read_parti, PARTI),),
    ),
    PromptSet(
        name="geneval",
        count=553,
        sha256="6e41e876a27de27e7d88e719f3f6846909e5195c1e80bb569a3e0da84da7336a",
        licence="MIT",
        source="djghosh13/geneval, commit af4902f",
        layouts=(Layout(("evaluation_metadata.jsonl",), _read_geneval, GENEVAL),),
    ),
    PromptSet(
        name="t2i-compbench",
        count=2400,
        sha256="f8eb1230c761181232e3ba993593365878e1ba01d08337ff3d0846fd4cf4c0f2",
        licence="MIT",
        source="Karine-Huang/T2I-CompBench, commit 1b70949",
        layouts=(Layout(COMPBENCH_FILES, _read_compbench, COMPBENCH),),
    ),
    PromptSet(
        name="hpdv2",
        count=3200,
        sha256="28ca271590329cd9617850c089f81a7f26fe65392efd0859057ac801caf73922",
        licence="Apache-2.0",
        source="zhwang/HPDv2, as in AIDC-AI/Diffusion-SDPO, commit 84fb241",
        layouts=(
            Layout(("hpsv2.json",), _read_hpd_sdpo, SDPO),
            Layout(tuple(f"{each}.json" for each in HPD_STYLES), _read_hpd, HPD),
            Layout(("benchmark_prompts.jsonl",), _read_hpd_lines),
        ),
    ),
    PromptSet(
        name="pickapic-v2-test",
        count=487,
        sha256="324b0c9e039a794ed380756c64a95823508f085d19048e555c05682954fa66dd",
        licence="Apache-2.0",
        source="distinct prompts of test_unique of yuvalkirstain/pickapic_v2, as in AIDC-AI/Diffusion-SDPO, 84fb241",
        layouts=(Layout(("papv2.json",), _read_prompt_list, SDPO), Layout(("prompts.jsonl",), _read_prompt_lines)),
    ),
    PromptSet(
        name="dreambench",
        count=750,
        sha256="64f1f7666cf65153f19bc63dd3f6950ed725e4f376ca6af037279d1a80946460",
        licence="CC-BY-4.0",
        source="google/dreambooth, commit 4f887af",
        layouts=(Layout(("prompts_and_classes.txt",), _read_dreambooth, DREAMBOOTH),),
    ),
    PromptSet(
        name="i2p",
        count=4703,
        sha256=None,
        licence="MIT, as its authors state",
        source="AIML-TUDA/i2p on the hub",
        layouts=(Layout(("0.parquet",), _read_i2p, I2P), Layout(("i2p_benchmark.csv",), _read_i2p)),
    ),
)
"""Sets by name."""
