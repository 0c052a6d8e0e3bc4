"""Planning and committing against a table of ten million rows: `python -m benchmarks.scale [--rows 10000000]`.

Makes a table as ingest leaves it (random keys, 16 pairs a prompt, small files merged), then, in a fresh process, plans
one new file and commits its unit: what a driver does that goes on with a large data set.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from deltalake import CommitProperties, Transaction, write_deltalake

from pipelines.config import IngestConfig, SourceConfig
from pipelines.dataset.layout import PAIRS, pairs_table
from pipelines.dataset.pair import PAIRS_SCHEMA
from pipelines.dataset.storage import Storage
from pipelines.ingest.committer import Committer
from pipelines.ingest.drop_budget import check_drop_budget
from pipelines.ingest.execution import is_up_to_date, pending_of, plan_units, write_unit
from pipelines.ingest.policy import Policy

RESULTS = Path(__file__).parent / "results" / "scale.json"
ROWS_A_COMMIT = 10_000
PAIRS_A_PROMPT = 16
MAX_SECONDS, MAX_BYTES = 20.0, 2_000_000_000


def hexadecimal(rng: np.random.Generator, count: int, digits: int) -> pa.Array:
    """Random strings of hex digits."""
    text = rng.bytes(count * digits // 2).hex()
    return pa.array([text[start : start + digits] for start in range(0, len(text), digits)])


def make_table(storage: Storage, num_rows: int, units: list[str] | None = None) -> None:
    """Rows of the shape that ingest commits, about 97 % kept; of these units, or of numbered ones."""
    rng = np.random.default_rng(0)
    for number, start in enumerate(range(0, num_rows, ROWS_A_COMMIT)):
        count = min(ROWS_A_COMMIT, num_rows - start)
        prompts = hexadecimal(rng, count // PAIRS_A_PROMPT + 1, 32).take(pa.array(np.arange(count) // PAIRS_A_PROMPT))
        tie = rng.random(count) < 0.02
        columns = {
            "pair_key": hexadecimal(rng, count, 32), "mirrored": rng.random(count) < 0.5,
            "prompt": prompts, "prompt_id": prompts,
            "label_0": np.where(tie, 0.5, rng.integers(0, 2, count)), "status": np.where(tie, "tie", "kept"),
            "reason": pa.array(np.where(tie, "equal_preference", None), pa.string()),
            "split": ["train"] * count, "source_split": ["train"] * count,
            "source": ["pickapic"] * count, "source_uri": [f"s3://bucket/{number}.parquet"] * count,
            "source_row": np.arange(count), "source_pair": np.zeros(count, np.int32),
            "unit": [f"{number:032x}"] * count,
            "image_0_sha256": hexadecimal(rng, count, 64), "image_1_sha256": hexadecimal(rng, count, 64),
            "shard": [f"dataset/shards/{number:032x}-00000.tar"] * count, "shard_bytes": np.full(count, 1 << 28),
            "shard_sha256": ["0" * 64] * count,
        }  # fmt: skip
        arrays = [
            pa.array(columns[field.name]).cast(field.type) if field.name in columns else pa.nulls(count, field.type)
            for field in PAIRS_SCHEMA
        ]
        write_deltalake(
            storage.uri(PAIRS), pa.Table.from_arrays(arrays, schema=PAIRS_SCHEMA), mode="append",
            commit_properties=CommitProperties(
                app_transactions=[Transaction(units[number] if units else f"{number:032x}", 1)]
            ),
        )  # fmt: skip

    pairs_table(storage).merge_files()  # as every ingest of many units ends


def measure(storage: Storage, source: str) -> dict[str, float]:
    """The driver's part of an ingest of one new file, step by step."""
    config = IngestConfig(sources=(SourceConfig(format="jsonl", path=source),), max_drop_ratio=1.0)
    times: dict[str, float] = {}
    started = time.monotonic()

    def note(what: str) -> None:
        times[what] = round(time.monotonic() - started - sum(times.values()), 2)

    assert not is_up_to_date(config, storage, plan_units(config))
    (unit,) = pending_of(plan_units(config), storage)
    note("plan_s")
    rows = write_unit(unit, storage)
    note("write_unit_s")
    committer = Committer(pairs_table(storage), Policy.of(config))
    judged = committer.append(unit.id, rows)
    note("first_commit_s")
    for number in range(5):
        committer.append(f"again {number}", judged)
    note("five_more_commits_s")
    check_drop_budget(config, storage)
    assert is_up_to_date(config, storage, plan_units(config))
    note("check_s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return times | {"total_s": round(time.monotonic() - started, 2), "peak_bytes": peak}


def main() -> None:
    """Make the table, measure in a process of its own, check the limits."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rows", type=int, default=10_000_000)
    arguments.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.measure:
        print(json.dumps(measure(Storage(options.measure[0]), options.measure[1])))
        return
    with tempfile.TemporaryDirectory(prefix="mapo-scale-", dir=Path.cwd()) as work:
        storage = Storage(f"{work}/storage")
        started = time.monotonic()
        make_table(storage, options.rows)
        print(f"{options.rows:,} rows in {time.monotonic() - started:.0f} s")
        source = Path(work) / "new.jsonl"
        record = {"prompt": "new", "image_0": "none.jpg", "image_1": "none.jpg", "label_0": 1}
        source.write_text("\n".join(json.dumps(record | {"prompt": f"new {i}"}) for i in range(1000)))
        command = [sys.executable, "-m", "benchmarks.scale", "--measure", storage.url, str(source)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(json.dumps(result, indent=1))
    report = {
        "conditions": {"rows": options.rows, "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "result": result,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    assert result["total_s"] <= MAX_SECONDS, f"{result['total_s']} s, limit {MAX_SECONDS}"
    assert result["peak_bytes"] <= MAX_BYTES, f"{result['peak_bytes']:,} bytes, limit {MAX_BYTES:,}"


if __name__ == "__main__":
    main()
