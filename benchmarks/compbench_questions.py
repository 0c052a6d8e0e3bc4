"""Ask spaCy once for the questions and the words of T2I-CompBench++'s prompts, and write them beside the prompts.

    pip install spacy==3.5.3 URL-OF-en_core_web_sm-3.5.0      # in an environment of its own; both are what the official
    python -m benchmarks.compbench_questions FOLDER           # requirements.txt pins
    mapo suites fetch t2i-compbench --from FOLDER

FOLDER has the benchmark's files, such as `color_val.txt`; `questions.jsonl` is written into it. A question is a noun
chunk and a question mark, as in the official BLIP_vqa.py: chunks that only name a place are dropped, and at most eight
are asked. Another version of the model finds other chunks, and scores then do not compare.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipelines.suites.prompt_files import QUESTIONS
from pipelines.suites.prompt_sets import prompt_set

MODEL, VERSION = "en_core_web_sm", "3.5.0"
DROPPED = ("top", "the side", "the left", "the right")
"""Chunks that name a place and no object."""
MAX_QUESTIONS = 8
"""`--np_num` of the official script."""
WAY_OUT = (
    f"pip install spacy==3.5.3 https://github.com/explosion/spacy-models/releases/download/{MODEL}-{VERSION}/"
    f"{MODEL}-{VERSION}-py3-none-any.whl"
)


def questions_of(chunks: Iterable[str]) -> list[str]:
    """Return the questions that the noun chunks of a prompt ask."""
    return [f"{chunk}?" for chunk in chunks if chunk not in DROPPED][:MAX_QUESTIONS]


def load_parser(version: str | None) -> Any:
    """Load spaCy's model.

    Args:
        version: The version that it must have; None takes any.

    Raises:
        SystemExit: spaCy or its model is not installed, or it has another version.
    """
    try:
        import spacy
    except ImportError:
        raise SystemExit(f"spaCy is not installed; mapo itself does not need it\nhint: {WAY_OUT}") from None
    try:
        parser = spacy.load(MODEL)
    except OSError:
        raise SystemExit(f"spaCy has no model {MODEL}\nhint: {WAY_OUT}") from None
    found = parser.meta["version"]
    if version is not None and found != version:
        raise SystemExit(
            f"{MODEL} is {found}, but T2I-CompBench's requirements pin {version}; other versions find other chunks\n"
            f"hint: {WAY_OUT}; `--any-version` takes what is there, under another name"
        )
    return parser


def label_of(parser: Any) -> str:
    """Return the name of a parser with its versions, which goes into protocols."""
    import spacy

    return f"{MODEL} {parser.meta['version']}, spaCy {spacy.__version__}, noun chunks"


def row_of(prompt: str, parser: Any) -> dict[str, Any]:
    """Return a prompt's line of the file."""
    parsed = parser(prompt)
    return {
        "prompt": prompt,
        "questions": questions_of(chunk.text for chunk in parsed.noun_chunks),
        "words": [[word.text, word.pos_] for word in parsed],
    }


def prompts_in(folder: Path) -> list[str]:
    """Return the distinct prompts of the benchmark in a folder, in its order."""
    layout = prompt_set("t2i-compbench").layouts[0]
    rows = layout.read({name: (folder / name).read_bytes() for name in layout.files})
    return list(dict.fromkeys(row.prompt for row in rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file of questions."""
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("folder", type=Path, help="the benchmark's files")
    options.add_argument("--any-version", action="store_true", help=f"do not insist on {MODEL} {VERSION}")
    given = options.parse_args(arguments)
    parser = load_parser(None if given.any_version else VERSION)
    lines = [{"parser": label_of(parser)}, *(row_of(prompt, parser) for prompt in prompts_in(given.folder))]
    target = given.folder / QUESTIONS
    target.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    sys.stdout.write(f"{target}: {len(lines) - 1:,} prompts, by {lines[0]['parser']}\n")


if __name__ == "__main__":
    main()
