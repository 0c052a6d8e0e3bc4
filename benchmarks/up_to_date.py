"""`mapo run` on an up-to-date run of ten million rows: `PYTHONPATH=tests/support python -m benchmarks.up_to_date`.

Makes the tables of pairs, latents and texts as the stages leave them, and the records of a finished run; then the
installed command says, in a process of its own, that everything is up to date. Measured: its seconds, and those of a
plan for another run of the same storage, which has no records and asks the tables.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from deltalake import write_deltalake

from benchmarks.encode import write_model
from benchmarks.scale import PAIRS_A_PROMPT, ROWS_A_COMMIT, make_table
from orchestration.config import RunConfig
from orchestration.run.context import Run
from orchestration.stages import encode, ingest
from orchestration.stages.registry import ALL_STAGES, STAGES
from pipelines.dataset.layout import LATENTS_SCHEMA, TEXT_SCHEMA, latents_table, pairs_table, text_table
from pipelines.dataset.pair import NULL_PROMPT_ID
from pipelines.dataset.storage import Storage
from pipelines.encode.fingerprint import latents_fingerprint, text_fingerprint
from pipelines.ingest.execution import plan_units
from training.export import marker

RESULTS = Path(__file__).parent / "results" / "up_to_date.json"
MAX_SECONDS = 20.0
ROWS_A_FILE = 500_000


def write_encoded(storage: Storage, config: RunConfig) -> None:
    """A row for every kept pair and every prompt, under the fingerprints of the configuration."""
    assert config.encode
    pairs = pairs_table(storage)
    kept = pairs.read(["pair_key", "prompt_id"], pc.field("status") == "kept")
    prompts = pa.concat_arrays([pa.array([NULL_PROMPT_ID]), kept["prompt_id"].unique()])
    for table, schema, column, keys in (
        (latents_table(storage, latents_fingerprint(config.encode)), LATENTS_SCHEMA, "pair_key", kept["pair_key"]),
        (text_table(storage, text_fingerprint(config.encode)), TEXT_SCHEMA, "prompt_id", pa.chunked_array([prompts])),
    ):
        for start in range(0, len(keys), ROWS_A_FILE):
            part = keys.slice(start, ROWS_A_FILE).combine_chunks()
            given = {column: part, "status": pa.array(["kept"] * len(part))}
            columns = [given[f.name] if f.name in given else pa.nulls(len(part), f.type) for f in schema]
            write_deltalake(table.uri, pa.Table.from_arrays(columns, schema=schema), mode="append")


def write_records(run: Run) -> None:
    """What the stages of a finished run leave, as far as later ones look at it."""
    checkpoint = f"{run.folder}/checkpoints/0/step-00002000-0001-00000000"
    for name in ALL_STAGES:
        key = STAGES[name].look(run).key
        assert key is not None, name
        details: dict[str, Any] = {}
        if name == "ingest":
            details = {"checked": ingest.what_was_checked(run, key)}
        if name == "encode":
            version = pairs_table(run.storage).version
            assert version is not None
            details = {"versions": encode.versions(run, version, encode.fingerprints(run))}
        if name == "train":
            details = {"checkpoint": checkpoint, "best_checkpoint": checkpoint}
        if name == "export":
            run.storage.write(f"{run.model}/{marker(run.config.export)}", b"{}")
        if name == "report":
            run.storage.write(run.report, b"<!doctype html>")
        run.journal.finish(name, key=key, summary="made by a benchmark", seconds=1.0, details=details)


def measure(work: Path, num_rows: int) -> dict[str, Any]:
    """Make everything, then run the command on it."""
    sources = work / "sources"
    sources.mkdir()
    for number in range(-(-num_rows // ROWS_A_COMMIT)):
        (sources / f"{number:05d}.jsonl").write_text(
            json.dumps({"prompt": f"p {number}", "label_0": 1, "image_0": "0.jpg", "image_1": "1.jpg"})
        )
    settings = {
        "name": "large", "storage": str(work / "storage"),
        "ingest": {"sources": [{"format": "jsonl", "path": str(sources / "*.jsonl")}], "max_drop_ratio": 1.0},
        "encode": {"model": write_model(work / "model").model, "resolution": 64},
        "train": {"num_workers": 1, "precision": "fp32"},
    }  # fmt: skip
    file = work / "large.yaml"
    file.write_text(yaml.safe_dump(settings))
    config = RunConfig.model_validate(settings)
    run = Run.open(config, print)
    assert config.ingest
    started = time.monotonic()
    make_table(run.storage, num_rows, units=[unit.id for unit in plan_units(config.ingest)])
    write_encoded(run.storage, config)
    print(f"{num_rows:,} rows in {time.monotonic() - started:.0f} s", flush=True)
    write_records(run)
    with_records = timed([str(Path(sys.executable).with_name("mapo")), "run", str(file)])
    without = timed([str(Path(sys.executable).with_name("mapo")), "run", str(file), "-o", "name=other", "--dry-run"])
    return {"rows": num_rows, "with_records": with_records, "plan_without_records": without}


def timed(command: list[str]) -> dict[str, Any]:
    """Seconds of a command, and what it said of the first three stages."""
    started = time.monotonic()
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    seconds = time.monotonic() - started
    assert all("up to date" in line for line in lines[:2]), lines
    return {"seconds": round(seconds, 2), "said": lines[:6]}


def main() -> None:
    """Measure, print, write the results, check the limit."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rows", type=int, default=10_000_000)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="mapo-up-to-date-") as work:
        result = measure(Path(work), options.rows)
    print(json.dumps(result, indent=1))
    conditions = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "pairs_a_prompt": PAIRS_A_PROMPT}
    RESULTS.write_text(json.dumps({"conditions": conditions, "result": result}, indent=1) + "\n")
    assert all("up to date" in line for line in result["with_records"]["said"]), result
    assert result["with_records"]["seconds"] <= MAX_SECONDS


if __name__ == "__main__":
    main()
