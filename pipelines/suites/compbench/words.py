"""Which objects a prompt of T2I-CompBench names, and how they shall lie: rules over its words."""

import itertools
from collections.abc import Sequence

from pipelines.suites.questions import Word

Objects = tuple[str, str] | None
"""The two objects of a relation; None where the official rule does not find exactly two."""
RELATIONS = (
    "on side of",
    "next to",
    "near",
    "on the left of",
    "on the right of",
    "on the bottom of",
    "on the top of",
    "on top of",
)
DEPTH_RELATIONS = ("in front of", "behind", "hidden")
PREPOSITIONS = ("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near")
"""Of complex prompts."""
LONGEST = 3


def relation_of(prompt: str, relations: Sequence[str] = RELATIONS) -> str | None:
    """Return the first of some relations that a prompt contains; None if it contains none."""
    return next((each for each in relations if each in prompt), None)


def objects_of(words: Sequence[Word]) -> Objects:
    """Return the objects of a simple prompt: its first and its last noun.

    The official code stops with an IndexError where there is no noun; here such a prompt has no objects.
    """
    nouns = [word.text for word in words if word.part == "NOUN"]
    return (nouns[0], nouns[-1]) if nouns else None


def objects_of_complex(words: Sequence[Word]) -> Objects:
    """Return the objects of a complex prompt: the nouns before and after its preposition, if there are two in all."""
    found: list[str] = []
    for place in range(len(words)):
        length = _preposition(words, place)
        if length:
            found += _before(words[:place])
            found += _after(words[place + length :])
    return (found[0], found[1]) if len(found) == 2 else None


def without_adjectives(words: Sequence[Word]) -> str:
    """Return a complex prompt as CLIP reads it: without its adjectives, a space between all words."""
    return " ".join(word.text for word in words if word.part != "ADJ")


def _preposition(words: Sequence[Word], place: int) -> int:
    """Return the number of words of the preposition that begins at a place; 0 if none does."""
    lengths = range(LONGEST, 0, -1)
    return next((each for each in lengths if _text(words[place : place + each]) in PREPOSITIONS), 0)


def _text(words: Sequence[Word]) -> str:
    return " ".join(word.text for word in words)


def _before(words: Sequence[Word]) -> list[str]:
    """Return the last noun or name."""
    return next(([word.text] for word in reversed(words) if word.part in ("NOUN", "PROPN")), [])


def _after(words: Sequence[Word]) -> list[str]:
    """Return the first noun; the first name if there is no noun."""
    return next(([word.text] for word in words if word.part == "NOUN"), _name(words))


def _name(words: Sequence[Word]) -> list[str]:
    """Return the end of the first name, unless it ends the prompt."""
    pairs = itertools.pairwise(words)
    return next(([word.text] for word, after in pairs if word.part == "PROPN" and after.part != "PROPN"), [])
