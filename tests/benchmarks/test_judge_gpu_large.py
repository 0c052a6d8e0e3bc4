"""The benchmark of the large judges: at full size what the papers describe, and it runs without Ray and diffusers."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import judge_gpu_large
from benchmarks.judge_speed import Speed, computing_in

ROOT = Path(__file__).parents[2]


def test_the_models_have_the_sizes_of_the_published_ones() -> None:
    with torch.device("meta"):
        detector, parts = judge_gpu_large.new_detector(small=False), judge_gpu_large.new_vqa(small=False)
    millions = sum(each.numel() for each in detector.parameters()) / 1e6
    assert millions == pytest.approx(69, abs=0.5), "Mask2Former, table 1: Swin-S has 69 M parameters"
    assert detector.config.num_queries == 100
    patches = parts["vision_model"].embeddings.position_embedding.shape[1] - 1
    assert patches == (480 // 16) ** 2
    tower = sum(each.numel() for each in parts["vision_model"].parameters()) / 1e6
    assert tower == pytest.approx(86, abs=1), "ViT-B/16"


def test_the_rehearsal_measures_both_judges_without_ray_diffusers_and_deepspeed(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'diffusers', 'deepspeed', 'pyarrow', 'deltalake', 'pydantic'): sys.modules[name] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "from benchmarks import judge_gpu_large\n"
        f"sys.argv = ['x', '--small', '--rounds', '1', '--results', {str(tmp_path / 'found.json')!r}]\n"
        "judge_gpu_large.main()\n"
    )
    path = f"{ROOT}:{ROOT / 'tests' / 'support'}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["is_small"]
    for name in ("detector", "vqa"):
        rows: list[dict[str, Any]] = found[name]
        assert all(row["images_per_s"] > 0 for row in rows)
        bare = {(row["dtype"], row["batch_size"]): row["images_per_s"] for row in rows if row["hand"] == "bare"}
        assert {dtype for dtype, _ in bare} >= {"float32", "bfloat16"}
        ours = [row for row in rows if row["hand"] == "ours"]
        assert ours
        for row in ours:
            assert row["dtype"] == "float32", "scorers know no other type"
            reference = bare["float32", 1 if name == "detector" else row["batch_size"]]
            assert math.isclose(row["of_bare"], row["images_per_s"] / reference, rel_tol=0.01)
    nothing, many = (row["num_objects"] for row in found["detector"] if row["hand"] == "ours")
    assert nothing == 0
    assert many > 0


def test_a_batch_that_does_not_fit_has_no_figure_and_no_ratio() -> None:
    rows = [
        judge_gpu_large._row("ours", "float32", 8, Speed(2.0, 1.5)),
        judge_gpu_large._row("bare", "float32", 8, None),
    ]
    ours, bare = judge_gpu_large._with_ratios(rows, lambda row: 8)
    assert (ours["images_per_s"], ours["peak_gib"]) == (2.0, 1.5)
    assert "of_bare" not in ours
    assert bare["images_per_s"] is None


def test_types_are_switched_back() -> None:
    switches: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [each.allow_tf32 for each in switches]
    with computing_in("tf32"):
        assert all(each.allow_tf32 for each in switches)
    assert [each.allow_tf32 for each in switches] == before
    with computing_in("float32"):
        assert not any(each.allow_tf32 for each in switches)
    with computing_in("bfloat16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
