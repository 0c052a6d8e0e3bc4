"""Score samples with T2I-CompBench++'s own detectors, in the container of the Dockerfile beside this file.

    python score.py --part plane --prompts spatial_val.txt SAMPLES questions.jsonl scores.jsonl

SAMPLES is `dataset/samples` of a storage, or a copy of it. What is written is what `mapo scores import` takes. The
detectors run as in UniDet_eval of Karine-Huang/T2I-CompBench at 1b70949: fp16, confidence 0.5, images of at most 480
pixels. What follows from the objects is computed by pipelines/suites/compbench, which needs none of them.
"""

import argparse
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.suites.compbench.detections import Detected, as_detected
from pipelines.suites.compbench.numeracy import counted_in, score_numeracy
from pipelines.suites.compbench.spatial import score_2d, score_3d
from pipelines.suites.compbench.words import DEPTH_RELATIONS, objects_of, objects_of_complex, relation_of
from pipelines.suites.questions import Questions, Word, read_questions

COMMIT = "T2I-CompBench 1b70949"
CHECKPOINTS = {"plane": "RS200", "complex": "RS200", "depth": "R50", "numeracy": "R50"}
"""UniDet's checkpoint by part, as in the official scripts."""
SCORERS = {
    "plane": "compbench-2d",
    "complex": "compbench-2d-complex",
    "depth": "compbench-3d",
    "numeracy": "compbench-numeracy",
}
SHORT, LONG = 479, 480
"""Side of the shorter edge, and the most for the longer one, in pixels."""


@dataclass(frozen=True)
class Sample:
    """A sample as it lies in a tar."""

    image_sha256: str
    prompt_id: str
    prompt: str
    png: bytes


@dataclass(frozen=True)
class Seen:
    """What the detectors see in an image: objects, and for the part `depth` the depth map."""

    detected: list[Detected]
    depth_HW: Any = None


def samples_in(folder: Path, prompts: frozenset[str] | None = None) -> Iterator[Sample]:
    """Yield the samples of all tars below a folder, or those of some prompts."""
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as opened:
            files = {member.name: member for member in opened}
            for name in sorted(name for name in files if name.endswith(".png")):
                told = json.loads(_read(opened, files[name[: -len("png")] + "json"]))
                if prompts is None or told["prompt"] in prompts:
                    png = _read(opened, files[name])
                    yield Sample(hashlib.sha256(png).hexdigest(), told["prompt_id"], told["prompt"], png)


def _read(opened: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = opened.extractfile(member)
    assert file is not None
    return file.read()


def score(part: str, prompt: str, words: Sequence[Word], seen: Seen, protocol: Any) -> float:
    """Return the score of one image.

    Raises:
        ValueError: The prompt has nothing to count.
    """
    if part == "plane":
        return score_2d(objects_of(words), relation_of(prompt), seen.detected, protocol=protocol)
    if part == "complex":
        return score_2d(objects_of_complex(words), relation_of(prompt), seen.detected, protocol=protocol)
    if part == "depth":
        relation = relation_of(prompt, DEPTH_RELATIONS)
        return score_3d(objects_of(words), relation, seen.detected, seen.depth_HW, protocol=protocol)
    return score_numeracy(counted_in([word.text for word in words]), seen.detected)


def rows_of(
    samples: Iterator[Sample], questions: Questions, part: str, protocol: str, look: Callable[[bytes], Seen]
) -> Iterator[dict[str, Any]]:
    """Yield a row of scores for each distinct image; an image that cannot be scored is a failure with its reason."""
    named = {"scorer": SCORERS[part], "fingerprint": fingerprint(part, protocol, questions)}
    done = set()
    for sample in samples:
        key = (sample.image_sha256, sample.prompt_id)
        if key in done:
            continue
        done.add(key)
        row = {"image_sha256": sample.image_sha256, "prompt_id": sample.prompt_id, **named}
        try:
            seen = look(sample.png)
            value = score(part, sample.prompt, questions.words[sample.prompt], seen, protocol)
        except (ValueError, OSError) as error:
            yield {**row, "value": None, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
        else:
            components = {"num_objects": len(seen.detected)}
            yield {**row, "value": value, "status": "scored", "reason": None, "components": components}


def fingerprint(part: str, protocol: str, questions: Questions) -> str:
    """Return what shapes the scores, in words."""
    words = f"{questions.parser} ({questions.sha256[:12]})"
    depth = ", DPT hybrid" if part == "depth" else ""
    return f"{COMMIT}, UniDet {CHECKPOINTS[part]}{depth}, fp16, protocol {protocol}, words by {words}"


class Detectors:
    """UniDet, and for the part `depth` DPT, from the official checkout in which this runs."""

    def __init__(self, part: str) -> None:
        import torch
        from experts import model_bank

        sys.argv = sys.argv[:1]  # the official loaders parse the command line themselves
        self._torch = torch
        self._unidet, self._resize = model_bank.load_expert_model(task="obj_detection", ckpt=CHECKPOINTS[part])
        self._labels = torch.load("dataset/detection_features.pt")["labels"]
        self._dpt, self._prepare = model_bank.load_expert_model(task="depth") if part == "depth" else (None, None)
        for model in (self._unidet, self._dpt):
            if model is not None:
                model.cuda()

    def __call__(self, png: bytes) -> Seen:
        """Look at an image."""
        import numpy as np
        from PIL import Image

        image = Image.open(io.BytesIO(png)).convert("RGB")
        pixels_HWC = np.array(self._resize(image))[:, :, ::-1]
        tensor = self._torch.as_tensor(pixels_HWC.astype("float32").transpose(2, 0, 1))
        wanted = {"image": tensor, "height": tensor.shape[1], "width": tensor.shape[2]}
        with self._torch.no_grad(), self._torch.autocast("cuda", self._torch.float16):
            fields = self._unidet([wanted])[0]["instances"].get_fields()
        labels = [self._labels[each] for each in fields["pred_classes"].tolist()]
        detected = as_detected(labels, fields["scores"].tolist(), fields["pred_boxes"].tensor.tolist())
        return Seen(detected, None if self._dpt is None else self._depth(image))

    def _depth(self, image: Any) -> Any:
        """Return the depth map at the detector's size, through 8 bits as the official code keeps it."""
        import numpy as np
        from PIL import Image

        with self._torch.no_grad(), self._torch.autocast("cuda", self._torch.float16):
            depth_HW = self._dpt(self._prepare(image)[None].cuda())[0].float()
        depth_HW = (depth_HW - depth_HW.min()) / (depth_HW.max() - depth_HW.min())
        size = (image.height, image.width)
        resize = self._torch.nn.functional.interpolate
        whole = resize(depth_HW[None, None], size=size, mode="bilinear", align_corners=True)
        kept = Image.fromarray(255 * whole[0, 0].cpu().numpy()).convert("L")
        return np.asarray(self._resize(kept), np.float32) / 255


def main(arguments: Sequence[str] | None = None, look: Callable[[bytes], Seen] | None = None) -> None:
    """Score the samples of a part and write the rows."""
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("samples", type=Path, help="dataset/samples of a storage")
    options.add_argument("questions", type=Path, help="questions.jsonl of benchmarks/compbench_questions.py")
    options.add_argument("target", type=Path, help="the .jsonl file to write")
    options.add_argument("--part", choices=sorted(SCORERS), required=True)
    options.add_argument("--prompts", type=Path, required=True, help="the prompts of the part, one a line")
    options.add_argument("--protocol", choices=("official", "ours"), default="official")
    given = options.parse_args(arguments)
    prompts = frozenset(line.strip() for line in given.prompts.read_text().splitlines() if line.strip())
    questions = read_questions(given.questions)
    if unknown := sorted(prompts - questions.words.keys()):
        raise SystemExit(
            f"{given.questions} has no words of {len(unknown)} of {len(prompts)} prompts, such as {unknown[0]!r}\n"
            "hint: make it with benchmarks/compbench_questions.py"
        )
    samples = samples_in(given.samples, prompts)
    rows = rows_of(samples, questions, given.part, given.protocol, look or Detectors(given.part))
    with given.target.open("w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
