"""The loader's benchmark in its short form: every sample once, right to the bit, by ours and by webdataset."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_benchmark_runs_in_its_short_form(tmp_path: Path) -> None:
    out = tmp_path / "loader.json"
    command = [sys.executable, "-m", "benchmarks.loader", "--small", "--work", str(tmp_path), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert set(report["results"]["local"]) == {"ours", "webdataset"}
    assert report["conditions"]["pairs"] == 96
    assert 0 < report["results"]["resume_s"]["ours"] < 60, "the whole point is that it does not depend on the step"
    assert report["ratios"].keys() == {"local disk: ours / webdataset"}
