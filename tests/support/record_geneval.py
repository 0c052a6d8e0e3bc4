"""Record what GenEval's official script says of made-up detections, for tests that need none of it.

    PYTHONPATH=.:tests/support python tests/support/record_geneval.py SOURCES tests/data/scorers

SOURCES holds a checkout of djghosh13/geneval (af4902f) under `djghosh13+geneval`. Its functions run as they are;
stand-ins take the place of the detector, of CLIP and of the images, whose answers are drawn here with a seed. Reasons
name relations in the order of a set; they are recorded in alphabetical order.
"""

import io
import json
import random
import re
import runpy
import sys
import tempfile
import types
from collections import defaultdict
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

Row = dict[str, Any]
PROMPTS_OF = {"single_object": 8, "two_object": 12, "counting": 17, "colors": 15, "position": 24, "color_attr": 19}
"""Different numbers, so that the mean of the tags is not the mean of the images."""
IMAGES = 4
NUM_PAIRS = 400
SIDE = 1024
CONFIDENCES = (0.05, 0.2, 0.29, 0.3, 0.31, 0.5, 0.7, 0.89, 0.9, 0.91, 0.95, 0.97, 0.99)


def official(sources: Path) -> dict[str, Any]:
    """Return the names of the official script, run without its models."""
    for name in ("mmdet", "mmdet.apis", "open_clip", "clip_benchmark", "clip_benchmark.metrics"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["mmdet.apis"].inference_detector = sys.modules["mmdet.apis"].init_detector = None  # type: ignore[attr-defined]
    sys.modules["clip_benchmark.metrics"].zeroshot_classification = types.SimpleNamespace()  # type: ignore[attr-defined]
    torch.cuda.is_available = lambda: True
    folder = sources / "djghosh13+geneval" / "evaluation"
    found = runpy.run_path(str(folder / "evaluate_images.py"), run_name="official")
    names: dict[str, Any] = found["evaluate_image"].__globals__
    names["classnames"] = (folder / "object_names.txt").read_text().splitlines()
    names |= {"THRESHOLD": 0.3, "COUNTING_THRESHOLD": 0.9, "MAX_OBJECTS": 16, "NMS_THRESHOLD": 1.0}
    names |= {"POSITION_THRESHOLD": 0.1, "object_detector": None}
    names["Image"] = types.SimpleNamespace(open=lambda _: Image.new("RGB", (1, 1)))
    return names


def rows_of(sources: Path, rng: random.Random) -> list[Row]:
    """Return some official rows of each tag."""
    text = (sources / "djghosh13+geneval" / "prompts" / "evaluation_metadata.jsonl").read_text()
    by_tag = defaultdict(list)
    for line in text.splitlines():
        by_tag[json.loads(line)["tag"]].append(json.loads(line))
    return [row for tag, count in PROMPTS_OF.items() for row in rng.sample(by_tag[tag], count)]


def a_box(rng: random.Random) -> list[int]:
    """Return a box on a coarse grid, so that ties and exact margins occur; now and then a line or a point."""
    step = rng.choice((1, 16, 128))
    left, top = (rng.randrange(0, SIDE, step) for _ in range(2))
    width, height = (rng.randrange(0, SIDE // 2, step) for _ in range(2))
    return [left, top, min(left + width, SIDE), min(top + height, SIDE)]


def beside(box: list[int], relation: str, rng: random.Random) -> list[int]:
    """Return a box that mostly lies as asked, seen from another one."""
    size = [max(1, box[2] - box[0]), max(1, box[3] - box[1])]
    away = rng.choice((0.1, 0.2, 0.4, 0.5, 1.0, 1.5))
    aside = rng.choice((0, 0, rng.uniform(-0.3, 0.3), rng.uniform(-1, 1), away, -away))
    sign = -1 if relation in ("left of", "above") else 1
    shift = (sign * away, aside) if relation.endswith("of") else (aside, sign * away)
    by = [int(shift[axis] * size[axis]) for axis in (0, 1)]
    return [box[0] + by[0], box[1] + by[1], box[2] + by[0], box[3] + by[1]]


def distinct(values: tuple[float, ...], count: int, rng: random.Random) -> list[float]:
    """Return different confidences, some of which lie at a threshold: the order of equal ones is not defined."""
    found: list[float] = []
    while len(found) < count:
        value = rng.choice(values)
        found.append(round(value - rng.randrange(1, 99) * 1e-4, 4) if value in found else value)
        found = list(dict.fromkeys(found))
    return found


def detections(row: Row, rng: random.Random) -> dict[str, list[list[Any]]]:
    """Return boxes with confidence and colour by class: mostly what the row asks for, seldom exactly."""
    found: dict[str, list[list[Any]]] = {}
    first: list[int] = []
    for wanted in row["include"]:
        count = max(0, wanted["count"] + rng.choice((-1, 0, 0, 0, 0, 1, 2, 18)))
        boxes = [a_box(rng) for _ in range(count)]
        if "position" in wanted and first and boxes:
            boxes[0] = beside(first, wanted["position"][0], rng)
        sure = CONFIDENCES[7:] if rng.random() < 0.7 else CONFIDENCES
        colours = [wanted["color"]] * 3 if "color" in wanted else []
        found[wanted["class"]] = [
            [*box, confidence, rng.choice([*colours, "red", "black", "white"])]
            for box, confidence in zip(boxes, distinct(sure, len(boxes), rng), strict=True)
        ]
        first = first or (boxes[0] if boxes else [])
    for other in rng.sample(("person", "dog", "car", "tv remote"), rng.choice((0, 1, 2))):
        found.setdefault(other, [[*a_box(rng), rng.choice(CONFIDENCES), "blue"]])
    return found


def judged(names: dict[str, Any], row: Row, found: dict[str, list[list[Any]]]) -> Row:
    """Return the verdict of the official script."""
    colour_of = {(name, *each[:5]): each[5] for name, boxes in found.items() for each in boxes}
    result = [np.array([each[:5] for each in found.get(name, [])], np.float32).reshape(-1, 5)
              for name in names["classnames"]]  # fmt: skip
    names["inference_detector"] = lambda *_: result
    names["color_classification"] = lambda _image, boxes, name: [
        colour_of[(name, *(round(float(value), 4) for value in box))] for box, _ in boxes
    ]
    verdict: Row = names["evaluate_image"]("", row)
    return verdict


def in_order(reason: str) -> str:
    """Return a reason with relations in alphabetical order."""
    return re.sub(r"found (\S+(?: of)?) and (\S+(?: of)?) target",
                  lambda each: "found {} and {} target".format(*sorted(each.groups())), reason)  # fmt: skip


def summary(sources: Path, results: list[Row]) -> Row:
    """Return the figures that the official summary prints."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file, redirect_stdout(io.StringIO()) as printed:
        file.writelines(json.dumps(each) + "\n" for each in results)
        file.flush()
        sys.argv = ["summary_scores.py", file.name]
        runpy.run_path(str(sources / "djghosh13+geneval" / "evaluation" / "summary_scores.py"))
    text = printed.getvalue()
    tags = re.findall(r"^(\w+) += ([\d.]+)% \((\d+) / (\d+)\)$", text, re.MULTILINE)
    (overall,) = re.findall(r"avg\. over tasks\): ([\d.]+)", text)
    return {"overall": float(overall), "tags": {tag: [int(right), int(count)] for tag, _, right, count in tags}}


def main() -> None:
    """Record the verdicts, the summary and relations of pairs of boxes."""
    sources, target = map(Path, sys.argv[1:])
    rng = random.Random(18)
    names = official(sources)
    rows = rows_of(sources, rng)
    cases, results = [], []
    for place, row in enumerate(rows):
        for _ in range(IMAGES):
            found = detections(row, rng)
            verdict = judged(names, row, found)
            results.append(verdict)
            cases.append([place, found, int(verdict["correct"]), in_order(verdict["reason"])])
    pairs = []
    for _ in range(NUM_PAIRS):
        box = a_box(rng)
        other = beside(box, rng.choice(("left of", "right of", "above", "below")), rng)
        as_found = [(np.array([*each, 1], np.float32), None) for each in (other, box)]
        pairs.append([other, box, sorted(names["relative_position"](*as_found))])
    lines = [json.dumps(each, separators=(",", ":")) for each in cases]
    record = {"rows": rows, "summary": summary(sources, results), "pairs": pairs}
    text = json.dumps(record, separators=(",", ":"))[:-1] + ',"cases":[\n' + ",\n".join(lines) + "\n]}\n"
    (target / "geneval.json").write_text(text)


if __name__ == "__main__":
    main()
