"""Cases of T2I-CompBench++'s evaluators: prompts with tagged words, detections and depth maps, all from seeds.

The stream of RandomState is frozen by NumPy, so that only the official answers are stored (`record_compbench.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipelines.suites.questions import Word

SIDE = 480
NAMES = ["cat", "dog", "bowl", "boat", "person", "wild bird", "fish", "jellyfish", "chair", "key", "tv", "barge, ship"]
"""Labels of detections; some contain the names of others."""
NOUNS = ["cat", "dog", "bowl", "boat", "girl", "man", "bird", "fish", "chair", "key", "ship"]
COUNTED = ["cat/cats", "bowl/bowls", "man/men", "goldfish/goldfish", "fish/fish", "ship/ships", "painting/paintings"]
PLANE = ["next to", "near", "on side of", "on the left of", "on the right of", "on the top of", "on the bottom of"]
DEPTH = ["in front of", "behind", "hidden by"]
COMPLEX = ["next to", "on top of", "on the left of", "on the right of", "on the top of", "near", "sat next to", "by"]
NUMBERS = ["one", "two", "three", "four", "five", "eight"]
PARTS = {
    "a": "DET",
    "the": "DET",
    "was": "AUX",
    "red": "ADJ",
    "fluffy": "ADJ",
    **dict.fromkeys(["Tom", "Sue", "Max", "Ann"], "PROPN"),
}
"""Parts of speech of words; the others are nouns, or adpositions if they are words of a relation."""
ADPOSITIONS = frozenset(
    ["next", "to", "near", "on", "side", "of", "left", "right", "top", "bottom", "in", "front", "behind", "by"]
)


@dataclass(frozen=True)
class Case:
    """An image of a prompt, as a detector sees it."""

    prompt: str
    labels: tuple[str, ...]
    scores: tuple[float, ...]
    boxes: tuple[tuple[float, ...], ...]
    seed: int

    @property
    def words(self) -> list[Word]:
        return tagged(self.prompt)

    def depth(self) -> NDArray[np.float32]:
        """The depth map, not square, in steps that differ along both axes."""
        random = np.random.RandomState(self.seed)
        coarse = random.randint(0, 256, (6, 9)).repeat(SIDE // 8, 0)[: SIDE * 3 // 4].repeat(SIDE // 9 + 1, 1)[:, :SIDE]
        return np.asarray(coarse / 255, np.float32)


def split_words(prompt: str) -> list[str]:
    """The words of a prompt with commas and full stops apart, as spaCy splits prompts as plain as these."""
    return prompt.replace(",", " ,").replace(".", " .").split()


def tagged(prompt: str) -> list[Word]:
    words = split_words(prompt)
    return [Word(each, PARTS.get(each, _part(each))) for each in words]


def _part(word: str) -> str:
    if word in ADPOSITIONS:
        return "ADP"
    return "NOUN" if word.isalpha() else "PUNCT"


def plane_cases() -> list[Case]:
    return [_case(seed, "a {} {relation} a {}", PLANE) for seed in range(90)]


def depth_cases() -> list[Case]:
    return [_case(seed, "a {} {relation} a {}", DEPTH) for seed in range(100, 180)]


def complex_cases() -> list[Case]:
    """Half of them with names of people, alone, at the end, and two in a row."""
    forms = ["The red {} was {relation} the fluffy {}.", "{} was {relation} {}.", "{} was {relation} {} Ann."]
    found = []
    for seed in range(200, 320):
        nouns = np.random.RandomState(seed).choice([*NOUNS, *(["Tom", "Sue", "Max"] * 4)], 2).tolist()
        found.append(_case(seed, forms[max(0, seed % 5 - 2)], COMPLEX, nouns if seed % 5 > 2 else ()))
    return found


def numeracy_cases() -> list[Case]:
    found = []
    for seed in range(400, 500):
        random = np.random.RandomState(seed)
        parts, names = [], []
        for place in random.choice(len(COUNTED), 1 + seed % 4, replace=False):
            one, many = COUNTED[place].split("/")
            number = NUMBERS[random.randint(len(NUMBERS))]
            parts.append(f"{number} {one if number == 'one' else many}")
            names.append({"man": "person", "ship": "barge, ship", "painting": "picture"}.get(one, one))
        case = _case(seed, "a {} {relation} a {}", PLANE, [*names, *names][:2])
        found.append(replace(case, prompt=", ".join(parts)))
    return found


def _case(seed: int, form: str, relations: Sequence[str], nouns: Sequence[str] = ()) -> Case:
    random = np.random.RandomState(seed)
    nouns = nouns or random.choice(NOUNS, 2, replace=False).tolist()
    prompt = form.format(*nouns, relation=relations[random.randint(len(relations))])
    asked = ["person" if noun in ("girl", "man") else noun for noun in nouns]
    names = [*NAMES, *asked, *asked]
    labels: list[str] = []
    boxes: list[list[float]] = []
    for place in range(random.randint(0, 9)):
        if boxes and random.rand() < 0.4:  # beside, or nearly the same as, the one before
            label, box = asked[place % 2] if random.rand() < 0.7 else names[random.randint(len(names))], boxes[-1]
            box = [min(SIDE, max(0, edge + int(random.randint(-12, 13)))) for edge in box]
        else:
            label = asked[place] if place < 2 and random.rand() < 0.9 else names[random.randint(len(names))]
            left, top = random.randint(0, 320, 2).tolist()
            box = [left, top, left + random.randint(20, 160), top + random.randint(20, 160)]
        labels.append(str(label))
        boxes.append([float(min(box[0], box[2] - 1)), float(min(box[1], box[3] - 1)), float(box[2]), float(box[3])])
    scores = np.float32(0.5 + 0.5 * random.rand(len(labels)))
    return Case(prompt, tuple(labels), tuple(map(float, scores)), tuple(map(tuple, boxes)), seed)
