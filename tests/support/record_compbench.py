"""Record what T2I-CompBench's own evaluators say of the cases in `compbench_cases.py`, and its own BLIP of questions.

    PYTHONPATH=.:tests/support:PACKAGES python tests/support/record_compbench.py REPOSITORY tests/data/compbench

REPOSITORY is a checkout of Karine-Huang/T2I-CompBench at 1b70949. Each script runs whole: `main` reads files and writes
its own results. What stands in for something else: the detector (the cases' boxes), spaCy (the cases' words), the
loaders, and word2number. PACKAGES holds timm, which BLIP's vision tower imports.
"""

import contextlib
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compbench_cases import SIDE, Case, complex_cases, depth_cases, numeracy_cases, plane_cases, tagged
from compbench_vqa import record_vqa

from pipelines.suites.questions import Word

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
PLANE = "labels/annotation_obj_detection_2d/vqa_result.json"
DEPTH = "labels/annotation_obj_detection_3d/vqa_result.json"
LABELS = "dataset/detection_features.pt"


class _Tensors:
    """detectron2's instances of one image."""

    def __init__(self, case: Case, labels: list[str]) -> None:
        boxes = torch.tensor(case.boxes, dtype=torch.float32).reshape(-1, 4)
        self._fields = {
            "pred_boxes": types.SimpleNamespace(tensor=boxes),
            "pred_classes": torch.tensor([labels.index(each) for each in case.labels], dtype=torch.long),
            "scores": torch.tensor(case.scores, dtype=torch.float32),
        }

    def get_fields(self) -> dict[str, Any]:
        return self._fields


class _Doc(list[Any]):
    """spaCy's words of a prompt."""

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return types.SimpleNamespace(text=" ".join(each.text for each in found)) if isinstance(place, slice) else found


def _doc(words: Sequence[Word]) -> _Doc:
    return _Doc(types.SimpleNamespace(text=each.text, pos_=each.part) for each in words)


def _stand_ins(cases: Sequence[Case], labels: list[str]) -> dict[str, Any]:
    """Return modules that give the official scripts the cases instead of images."""
    images = [f"samples/{case.prompt}_{place:06d}.png" for place, case in enumerate(cases)]
    loaded = [
        {"image": torch.zeros(3, SIDE * 3 // 4, SIDE), "image_path": image, "depth": torch.from_numpy(case.depth())}
        for image, case in zip(images, cases, strict=True)
    ]
    seen = {image: {"instances": _Tensors(case, labels)} for image, case in zip(images, cases, strict=True)}

    def model(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [seen[each["image_path"]] for each in batch]

    dataset = types.SimpleNamespace(Dataset=lambda *_: loaded, collate_fn=list)
    bank = types.SimpleNamespace(load_expert_model=lambda **_: (model, None))
    numbers = {name: place for place, name in enumerate(NUMBERS, 1)}
    return {
        "experts": types.ModuleType("experts"),
        "experts.model_bank": bank,
        "experts.model_bank_3d": bank,
        "experts.obj_detection": types.ModuleType("experts.obj_detection"),
        "experts.obj_detection.generate_dataset": dataset,
        "experts.obj_detection.generate_dataset_3d": dataset,
        "experts.depth": types.ModuleType("experts.depth"),
        "experts.depth.generate_dataset": dataset,
        "accelerate": types.SimpleNamespace(Accelerator=lambda **_: types.SimpleNamespace(prepare=lambda *each: each)),
        "spacy": types.SimpleNamespace(load=lambda _: lambda text: _doc(tagged(text))),
        "ruamel_yaml": types.SimpleNamespace(load=lambda *_, **__: {}, Loader=None),
        "matplotlib": types.ModuleType("matplotlib"),
        "matplotlib.pyplot": types.ModuleType("matplotlib.pyplot"),
        "word2number": types.SimpleNamespace(w2n=types.SimpleNamespace(word_to_num=numbers.__getitem__)),
    }


@contextlib.contextmanager
def _modules(found: dict[str, Any]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in found}
    sys.modules.update(found)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def run_official(script: Path, cases: Sequence[Case], labels: list[str], result: str, *options: str) -> list[float]:
    """Run a script of the benchmark over cases; return the answers that it writes, in the order of the cases."""
    with tempfile.TemporaryDirectory() as folder, _modules(_stand_ins(cases, labels)), contextlib.chdir(folder):
        Path("configs").mkdir()
        Path("configs/experts.yaml").touch()
        Path("labels/depth").mkdir(parents=True)  # there are depth maps already
        Path("examples").symlink_to(script.parents[1] / "examples")
        Path("work").mkdir()
        os.chdir("work")
        Path("configs").symlink_to("../configs")
        namespace: dict[str, Any] = {"__name__": "official"}
        load, arguments = torch.load, sys.argv
        torch.load = lambda *_, **__: {"labels": labels}  # type: ignore[assignment]
        sys.argv = [script.name, "--outpath", folder, *options]
        try:
            exec(compile(script.read_text(), str(script), "exec"), namespace)
            namespace["main"]()
        finally:
            torch.load, sys.argv = load, arguments
        answers = json.loads((Path(folder) / result).read_text())
    return [float(each["answer"]) for each in sorted(answers, key=lambda each: each["question_id"])]


def record_three_in_one(script: Path) -> dict[str, Any]:
    """Run the merger of the three parts over its own prompts, ten images of each."""
    lists = script.parents[1] / "examples" / "dataset"
    num = 10 * len((lists / "complex_val.txt").read_text().splitlines())
    random = np.random.RandomState(0)
    parts = {name: np.round(random.rand(num), 4).tolist() for name in ("attribute", "spatial", "action")}
    places = {
        "attribute": "annotation_blip",
        "spatial": "labels/annotation_obj_detection_2d",
        "action": "annotation_clip",
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, place in places.items():
            (Path(folder) / place).mkdir(parents=True)
            rows = [{"question_id": number, "answer": each} for number, each in enumerate(parts[name])]
            (Path(folder) / place / "vqa_result.json").write_text(json.dumps(rows))
        namespace: dict[str, Any] = {"__name__": "official"}
        arguments, sys.argv = sys.argv, [script.name, "--outpath", folder, "--data_path", str(lists)]
        try:
            exec(compile(script.read_text(), str(script), "exec"), namespace)
            namespace["main"]()
        finally:
            sys.argv = arguments
        found = json.loads((Path(folder) / "annotation_3_in_1" / "vqa_result.json").read_text())
    return {"seed": 0, "first_of_each_prompt": [found[place]["answer"] for place in range(0, num, 10)]}


def main(repository: Path, target: Path) -> None:
    """Record everything."""
    unidet = repository / "UniDet_eval"
    labels: list[str] = list(torch.load(unidet / LABELS, weights_only=True)["labels"])
    names = {
        name
        for each in (plane_cases, depth_cases, complex_cases, numeracy_cases)
        for case in each()
        for name in case.labels
    }
    labels += sorted(names - set(labels))  # the script looks labels up by number
    parts: dict[str, tuple[str, Callable[[], list[Case]], str, tuple[str, ...]]] = {
        "plane": ("2D_spatial_eval.py", plane_cases, PLANE, ()),
        "complex": ("2D_spatial_eval.py", complex_cases, PLANE, ("--complex", "True")),
        "depth": ("3D_spatial_eval.py", depth_cases, DEPTH, ()),
        "numeracy": ("numeracy_eval.py", numeracy_cases, "annotation_num/vqa_result.json", ()),
    }
    found: dict[str, Any] = {
        name: run_official(unidet / script, cases(), labels, result, *options)
        for name, (script, cases, result, options) in parts.items()
    }
    found["three_in_one"] = record_three_in_one(repository / "3_in_1_eval" / "3_in_1.py")
    listed = (repository / "examples" / "dataset" / "new_objects.txt").read_text().splitlines()
    found["plurals"] = dict(line.strip().lower().split(" - ") for line in listed)
    found["vqa"] = record_vqa(repository / "BLIPvqa_eval")
    target.mkdir(parents=True, exist_ok=True)
    (target / "recorded.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(*(Path(each).absolute() for each in sys.argv[1:]))
