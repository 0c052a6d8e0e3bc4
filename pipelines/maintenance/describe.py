"""`mapo data show`: what is in a data set, from its tables alone."""

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import LATENTS, TEXT, fingerprints, latents_table, pairs_table, text_table
from pipelines.dataset.pair import EMPTY_PROMPT_ID, NULL_PROMPT_ID, Status
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table

MAX_TOKENS = 77  # that both of SDXL's text encoders read


def describe_dataset(storage: Storage, version: int | None = None) -> dict[str, Any]:
    """Describe the data set; its JSON is part of the Contract.

    Args:
        storage: Where it lies.
        version: Of the table of pairs; the newest by default.

    Raises:
        SnapshotError: There is no data set.
    """
    table = pairs_table(storage, version)
    if table.version is None:
        raise SnapshotError(
            f"there is no data set at {storage.url}", "`mapo ingest CONFIG` makes one; is the storage right?"
        )
    rows = table.read(["status", "reason", "split", "prompt_id", "shard", "shard_bytes", "shard_sha256"])
    kept = rows.filter(pc.equal(rows["status"], str(Status.KEPT)))
    shards = _shards(rows)
    counted = Counter(rows["status"].to_pylist())
    return {
        "storage": storage.url,
        "version": table.version,
        "rows": {str(status): counted.get(str(status), 0) for status in Status},
        "reasons": dict(sorted(Counter(rows["reason"].drop_null().to_pylist()).items())),
        "splits": dict(sorted(Counter(kept["split"].to_pylist()).items())),
        "prompts": len(pc.unique(kept["prompt_id"])),
        "shards": shards,
        "bytes": sum(shard["bytes"] for shard in shards),
        "latents": [_encoded(latents_table(storage, f), f, "pairs") for f in fingerprints(storage, LATENTS)],
        "text": [_encoded(text_table(storage, f), f, "prompts") for f in fingerprints(storage, TEXT)],
    }


def describe_encoding(storage: Storage, latents: str, text: str) -> dict[str, Any]:
    """Describe what is encoded under two fingerprints, and what it takes, for the report."""
    pairs = latents_table(storage, latents).read(["status", "reason", "length"])
    texts = text_table(storage, text).read(["prompt_id", "status", "reason", "length", "num_tokens"])
    kept = pc.equal(pairs["status"], str(Status.KEPT))
    of_no_pair = pc.is_in(texts["prompt_id"], pa.array([NULL_PROMPT_ID, EMPTY_PROMPT_ID]))
    texts = texts.filter(pc.invert(of_no_pair))
    num_pairs, latents_bytes = pc.sum(kept).as_py() or 0, pc.sum(pairs["length"]).as_py() or 0
    text_bytes, mean_text = pc.sum(texts["length"]).as_py() or 0, pc.mean(texts["length"]).as_py()
    reasons = Counter([*pairs["reason"].drop_null().to_pylist(), *texts["reason"].drop_null().to_pylist()])
    num_slots, num_images = _images(storage)
    return {
        "pairs": num_pairs,
        "images": num_images,
        "image_slots": num_slots,
        "image_ratio": num_slots / num_images if num_images else None,
        "prompts": texts.num_rows,
        "truncated_prompts": pc.sum(pc.greater(texts["num_tokens"], MAX_TOKENS)).as_py() or 0,
        "max_tokens": MAX_TOKENS,
        "text_ratio": num_pairs / texts.num_rows if texts.num_rows else None,
        "bytes_per_pair": {
            "latents": latents_bytes / num_pairs if num_pairs else None,
            "text": text_bytes / num_pairs if num_pairs else None,
            "text_per_pair_storage": mean_text,
        },
        "quarantined": dict(sorted(reasons.items())),
    }


def _images(storage: Storage) -> tuple[int, int]:
    """Count the images of all kept pairs, and the distinct ones in their shards."""
    rows = pairs_table(storage).read(
        ["shard", "image_0_sha256", "image_1_sha256"], pc.field("status") == str(Status.KEPT)
    )
    images = [rows.select(["shard", f"image_{side}_sha256"]).rename_columns(["shard", "image"]) for side in (0, 1)]
    return 2 * rows.num_rows, pa.concat_tables(images).group_by(["shard", "image"]).aggregate([]).num_rows


def _shards(rows: Any) -> list[dict[str, Any]]:
    placed = rows.filter(pc.is_valid(rows["shard"]))
    grouped = placed.group_by(["shard", "shard_bytes", "shard_sha256"]).aggregate([([], "count_all")])
    found = [
        {"path": row["shard"], "bytes": row["shard_bytes"], "sha256": row["shard_sha256"], "pairs": row["count_all"]}
        for row in grouped.to_pylist()
    ]
    return sorted(found, key=lambda shard: str(shard["path"]))


def _encoded(table: Table, fingerprint: str, what: str) -> dict[str, Any]:
    rows = table.read(["status", "shard", "shard_bytes"])
    sizes = {s: b for s, b in zip(rows["shard"].to_pylist(), rows["shard_bytes"].to_pylist(), strict=True) if s}
    kept = Counter(rows["status"].to_pylist()).get(str(Status.KEPT), 0)
    return {
        "fingerprint": fingerprint,
        "version": table.version,
        what: kept,
        "quarantined": rows.num_rows - kept,
        "shards": len(sizes),
        "bytes": sum(sizes.values()),
    }


def summary_line(description: dict[str, Any]) -> str:
    """Return the accounting in one line; its parts add up to the rows read."""
    rows = description["rows"]
    parts = ", ".join(f"{rows[str(status)]:,} {status}" for status in Status)
    return f"{sum(rows.values()):,} rows: {parts}"


def as_text(description: dict[str, Any]) -> str:
    """Return the description for a terminal."""
    lines = [
        f"{description['storage']} · version {description['version']}",
        summary_line(description),
        f"{len(description['shards'])} shards, {description['bytes']:,} bytes, {description['prompts']:,} prompts, "
        + ", ".join(f"{count:,} {split}" for split, count in description["splits"].items()),
    ]
    lines += [f"  {count:>9,}  {reason}" for reason, count in description["reasons"].items()]
    for kind, unit in (("latents", "pairs"), ("text", "prompts")):
        lines += [
            f"{kind} {made['fingerprint']}: {made[unit]:,} {unit}, {made['shards']} shards, {made['bytes']:,} bytes"
            for made in description[kind]
        ]
    return "\n".join(lines)
