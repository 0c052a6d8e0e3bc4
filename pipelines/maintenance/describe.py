"""Describes a data set from its tables alone: for `mapo data show`, stages and the report."""

from collections import Counter
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import LATENTS, TEXT, fingerprints, latents_table, pairs_table, text_table
from pipelines.dataset.pair import EMPTY_PROMPT_ID, NULL_PROMPT_ID, Status
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.dataset.values import JsonObject

MAX_TOKENS = 77  # that both of SDXL's text encoders read


@dataclass(frozen=True)
class ShardFacts:
    """One shard of pairs, according to the table."""

    path: str
    bytes: int
    sha256: str
    pairs: int


@dataclass(frozen=True)
class EncodedFacts:
    """The encodings under one fingerprint.

    Args:
        items: The items counted: `pairs` or `prompts`.
        fingerprint: The fingerprint, which names the table.
        version: Version of the table.
        kept: Number of encoded items.
        quarantined: Number of items that could not be encoded.
        shards: Number of shards.
        bytes: Bytes of all shards.
    """

    items: str
    fingerprint: str
    version: int | None
    kept: int
    quarantined: int
    shards: int
    bytes: int

    def to_json(self) -> JsonObject:
        """Return the facts as `mapo data show --json` prints them."""
        return {
            "fingerprint": self.fingerprint,
            "version": self.version,
            self.items: self.kept,
            "quarantined": self.quarantined,
            "shards": self.shards,
            "bytes": self.bytes,
        }


@dataclass(frozen=True)
class DatasetFacts:
    """The contents of a data set.

    Args:
        storage: URL of the storage.
        version: Version of the table of pairs.
        rows: Rows by status.
        reasons: Rows that are not kept, by reason.
        splits: Kept pairs by split.
        prompts: Distinct prompts of kept pairs.
        shards: Shards of pairs, by path.
        latents: Encoded pairs, by fingerprint.
        text: Embedded prompts, by fingerprint.
    """

    storage: str
    version: int
    rows: dict[str, int]
    reasons: dict[str, int]
    splits: dict[str, int]
    prompts: int
    shards: tuple[ShardFacts, ...]
    latents: tuple[EncodedFacts, ...]
    text: tuple[EncodedFacts, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all shards of pairs."""
        return sum(shard.bytes for shard in self.shards)

    def to_json(self) -> JsonObject:
        """Return the facts as `mapo data show --json` prints them; the shape is part of the Contract."""
        return {
            "storage": self.storage,
            "version": self.version,
            "rows": self.rows,
            "reasons": self.reasons,
            "splits": self.splits,
            "prompts": self.prompts,
            "shards": [asdict(shard) for shard in self.shards],
            "bytes": self.bytes,
            "latents": [made.to_json() for made in self.latents],
            "text": [made.to_json() for made in self.text],
        }


@dataclass(frozen=True)
class MeanBytes:
    """Mean bytes that one encoded pair takes; None without any pairs.

    Args:
        latents: Bytes of its latents.
        text: Bytes of text embeddings, which pairs of one prompt share.
        text_per_pair_storage: Bytes of text embeddings if each pair had its own.
    """

    latents: float | None
    text: float | None
    text_per_pair_storage: float | None


@dataclass(frozen=True)
class EncodingFacts:
    """The encodings under two fingerprints, and their size.

    Args:
        pairs: Number of encoded pairs.
        images: Distinct images of kept pairs.
        image_slots: Images of kept pairs, including repeats.
        prompts: Distinct prompts.
        truncated_prompts: Prompts of more than `max_tokens`.
        max_tokens: The number of tokens that the text encoders read.
        bytes_per_pair: Mean bytes per pair on the storage.
        quarantined: Pairs and prompts that could not be encoded, by reason.
    """

    pairs: int
    images: int
    image_slots: int
    prompts: int
    truncated_prompts: int
    max_tokens: int
    bytes_per_pair: MeanBytes
    quarantined: dict[str, int]

    @property
    def image_ratio(self) -> float | None:
        """How often each image is used on average; None without any images."""
        return self.image_slots / self.images if self.images else None

    @property
    def text_ratio(self) -> float | None:
        """How many pairs share a prompt on average; None without any prompts."""
        return self.pairs / self.prompts if self.prompts else None


def describe_dataset(storage: Storage, version: int | None = None) -> DatasetFacts:
    """Describe the data set.

    Args:
        storage: The data set's storage.
        version: Version of the table of pairs; the newest by default.

    Raises:
        SnapshotError: There is no data set.
    """
    table = pairs_table(storage, version)
    if table.version is None:
        raise SnapshotError(
            f"there is no data set at {storage.url}", "`mapo ingest CONFIG` creates one; is the storage URL right?"
        )
    rows = table.read(["status", "reason", "split", "prompt_id", "shard", "shard_bytes", "shard_sha256"])
    kept = rows.filter(pc.equal(rows["status"], str(Status.KEPT)))
    counted = Counter(rows["status"].to_pylist())
    return DatasetFacts(
        storage=storage.url,
        version=table.version,
        rows={str(status): counted.get(str(status), 0) for status in Status},
        reasons=dict(sorted(Counter(rows["reason"].drop_null().to_pylist()).items())),
        splits=dict(sorted(Counter(kept["split"].to_pylist()).items())),
        prompts=len(pc.unique(kept["prompt_id"])),
        shards=_shards(rows),
        latents=tuple(_encoded(latents_table(storage, f), f, "pairs") for f in fingerprints(storage, LATENTS)),
        text=tuple(_encoded(text_table(storage, f), f, "prompts") for f in fingerprints(storage, TEXT)),
    )


def describe_encoding(storage: Storage, latents: str, text: str) -> EncodingFacts:
    """Describe the encodings under two fingerprints, and their size."""
    pairs = latents_table(storage, latents).read(["status", "reason", "length"])
    texts = text_table(storage, text).read(["prompt_id", "status", "reason", "length", "num_tokens"])
    kept = pc.equal(pairs["status"], str(Status.KEPT))
    of_no_pair = pc.is_in(texts["prompt_id"], pa.array([NULL_PROMPT_ID, EMPTY_PROMPT_ID]))
    texts = texts.filter(pc.invert(of_no_pair))
    num_pairs, latents_bytes = pc.sum(kept).as_py() or 0, pc.sum(pairs["length"]).as_py() or 0
    text_bytes, mean_text = pc.sum(texts["length"]).as_py() or 0, pc.mean(texts["length"]).as_py()
    reasons = Counter([*pairs["reason"].drop_null().to_pylist(), *texts["reason"].drop_null().to_pylist()])
    num_slots, num_images = _images(storage)
    return EncodingFacts(
        pairs=num_pairs,
        images=num_images,
        image_slots=num_slots,
        prompts=texts.num_rows,
        truncated_prompts=pc.sum(pc.greater(texts["num_tokens"], MAX_TOKENS)).as_py() or 0,
        max_tokens=MAX_TOKENS,
        bytes_per_pair=MeanBytes(
            latents=latents_bytes / num_pairs if num_pairs else None,
            text=text_bytes / num_pairs if num_pairs else None,
            text_per_pair_storage=mean_text,
        ),
        quarantined=dict(sorted(reasons.items())),
    )


def _images(storage: Storage) -> tuple[int, int]:
    """Count the images of all kept pairs, and the distinct ones in their shards."""
    rows = pairs_table(storage).read(
        ["shard", "image_0_sha256", "image_1_sha256"], pc.field("status") == str(Status.KEPT)
    )
    images = [rows.select(["shard", f"image_{side}_sha256"]).rename_columns(["shard", "image"]) for side in (0, 1)]
    return 2 * rows.num_rows, pa.concat_tables(images).group_by(["shard", "image"]).aggregate([]).num_rows


def _shards(rows: pa.Table) -> tuple[ShardFacts, ...]:
    placed = rows.filter(pc.is_valid(rows["shard"]))
    grouped = placed.group_by(["shard", "shard_bytes", "shard_sha256"]).aggregate([([], "count_all")])
    found = [
        ShardFacts(row["shard"], row["shard_bytes"], row["shard_sha256"], row["count_all"])
        for row in grouped.to_pylist()
    ]
    return tuple(sorted(found, key=lambda shard: shard.path))


def _encoded(table: Table, fingerprint: str, items: str) -> EncodedFacts:
    rows = table.read(["status", "shard", "shard_bytes"])
    sizes = {s: b for s, b in zip(rows["shard"].to_pylist(), rows["shard_bytes"].to_pylist(), strict=True) if s}
    kept = Counter(rows["status"].to_pylist()).get(str(Status.KEPT), 0)
    return EncodedFacts(
        items=items,
        fingerprint=fingerprint,
        version=table.version,
        kept=kept,
        quarantined=rows.num_rows - kept,
        shards=len(sizes),
        bytes=sum(sizes.values()),
    )


def summary_line(facts: DatasetFacts) -> str:
    """Return the accounting in one line; its parts add up to the rows read."""
    parts = ", ".join(f"{facts.rows[str(status)]:,} {status}" for status in Status)
    return f"{sum(facts.rows.values()):,} rows: {parts}"


def as_text(facts: DatasetFacts) -> str:
    """Return the facts for a terminal."""
    lines = [
        f"{facts.storage} · version {facts.version}",
        summary_line(facts),
        f"{len(facts.shards)} shards, {facts.bytes:,} bytes, {facts.prompts:,} prompts, "
        + ", ".join(f"{count:,} {split}" for split, count in facts.splits.items()),
    ]
    lines += [f"  {count:>9,}  {reason}" for reason, count in facts.reasons.items()]
    for kind, encoded in (("latents", facts.latents), ("text", facts.text)):
        lines += [
            f"{kind} {made.fingerprint}: {made.kept:,} {made.items}, {made.shards} shards, {made.bytes:,} bytes"
            for made in encoded
        ]
    return "\n".join(lines)
