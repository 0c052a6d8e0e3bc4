"""Describes a data set from its tables alone: for `mapo data show`, stages and the report."""

from collections import Counter
from dataclasses import asdict, dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import LATENTS, TEXT, fingerprints, latents_table, pairs_table, text_table
from pipelines.dataset.pair import EMPTY_PROMPT_ID, JUDGED, KINDS, NULL_PROMPT_ID, PAIR, PRIOR, Status, of_kind
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.dataset.values import JsonObject
from pipelines.encode.fingerprint import noted_parts

END_MARKS = 2
CHUNK_TOKENS = 75  # that both of SDXL's text encoders read between their end marks
SHARD = ["shard", "shard_bytes", "shard_sha256"]


@dataclass(frozen=True)
class ShardFacts:
    """One shard of pairs or single images, according to the table."""

    path: str
    bytes: int
    sha256: str
    pairs: int
    singles: int = 0

    def to_json(self) -> JsonObject:
        """Return the facts as `mapo data show --json` prints them."""
        found = asdict(self)
        return found if self.singles else {name: found[name] for name in found if name != "singles"}


@dataclass(frozen=True)
class EncodedFacts:
    """The encodings under one fingerprint.

    Args:
        items: The items counted: `pairs` or `prompts`.
        fingerprint: The fingerprint, which names the table.
        version: Version of the table.
        kept: Number of encoded items.
        singles: Number of encoded single images, in addition to the pairs.
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
    singles: int = 0

    @property
    def shown(self) -> str:
        """The items in words."""
        return f"{self.kept:,} {self.items}" + (f", {self.singles:,} single images" if self.singles else "")

    def to_json(self) -> JsonObject:
        """Return the facts as `mapo data show --json` prints them."""
        return {
            "fingerprint": self.fingerprint,
            "version": self.version,
            self.items: self.kept,
            **({"singles": self.singles} if self.singles else {}),
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
        kinds: Kept rows by kind: pairs, and single images that are judged or of a class (`prior`).
        verdicts: Kept judged images: good and bad.
        splits: Kept rows by split.
        prompts: Distinct prompts of kept rows.
        shards: Shards of pairs and single images, by path.
        latents: Encoded pairs and single images, by fingerprint.
        text: Embedded prompts, by fingerprint.
    """

    storage: str
    version: int
    rows: dict[str, int]
    reasons: dict[str, int]
    kinds: dict[str, int]
    verdicts: dict[str, int]
    splits: dict[str, int]
    prompts: int
    shards: tuple[ShardFacts, ...]
    latents: tuple[EncodedFacts, ...]
    text: tuple[EncodedFacts, ...]

    @property
    def num_singles(self) -> int:
        """Kept single images."""
        return self.kinds[JUDGED] + self.kinds[PRIOR]

    @property
    def bytes(self) -> int:
        """Bytes of all shards of pairs and single images."""
        return sum(shard.bytes for shard in self.shards)

    def to_json(self) -> JsonObject:
        """Return the facts as `mapo data show --json` prints them; the shape is part of the Contract."""
        return {
            "storage": self.storage,
            "version": self.version,
            "rows": self.rows,
            "reasons": self.reasons,
            "kinds": self.kinds,
            "verdicts": self.verdicts,
            "splits": self.splits,
            "prompts": self.prompts,
            "shards": [shard.to_json() for shard in self.shards],
            "bytes": self.bytes,
            "latents": [made.to_json() for made in self.latents],
            "text": [made.to_json() for made in self.text],
        }


@dataclass(frozen=True)
class MeanBytes:
    """Mean bytes that one encoded pair or single image takes; None without any.

    Args:
        latents: Bytes of its latents.
        text: Bytes of text embeddings, which those of one prompt share.
        text_per_pair_storage: Bytes of text embeddings if each had its own.
    """

    latents: float | None
    text: float | None
    text_per_pair_storage: float | None


@dataclass(frozen=True)
class EncodingFacts:
    """The encodings under two fingerprints, and their size.

    Args:
        pairs: Number of encoded pairs.
        singles: Number of encoded single images.
        images: Distinct images of kept rows.
        image_slots: Images of kept rows, including repeats.
        prompts: Distinct prompts.
        truncated_prompts: Prompts of more than `max_tokens`.
        max_tokens: The number of tokens that are embedded, with both end marks: 77 in one chunk, 227 in three.
        longest_prompt: Tokens of the longest prompt, with both end marks; 0 without any prompts.
        bytes_per_pair: Mean bytes per pair or single image on the storage.
        quarantined: Pairs, single images and prompts that could not be encoded, by reason.
    """

    pairs: int
    singles: int
    images: int
    image_slots: int
    prompts: int
    truncated_prompts: int
    max_tokens: int
    longest_prompt: int
    bytes_per_pair: MeanBytes
    quarantined: dict[str, int]

    @property
    def image_ratio(self) -> float | None:
        """How often each image is used on average; None without any images."""
        return self.image_slots / self.images if self.images else None

    @property
    def text_ratio(self) -> float | None:
        """How many pairs or single images share a prompt on average; None without any prompts."""
        return (self.pairs + self.singles) / self.prompts if self.prompts else None


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
    rows = table.read(["status", "reason", "kind", "label_0", "split", "prompt_id", *SHARD])
    rows = rows.set_column(2, "kind", pc.fill_null(rows["kind"], PAIR))
    kept = rows.filter(pc.equal(rows["status"], str(Status.KEPT)))
    judged = kept.filter(pc.equal(kept["kind"], JUDGED))
    num_good = pc.sum(pc.equal(judged["label_0"], 1.0)).as_py() or 0
    singles = _encoded_singles(table)
    counted, kinds = Counter(rows["status"].to_pylist()), Counter(kept["kind"].to_pylist())
    return DatasetFacts(
        storage=storage.url,
        version=table.version,
        rows={str(status): counted.get(str(status), 0) for status in Status},
        reasons=dict(sorted(Counter(rows["reason"].drop_null().to_pylist()).items())),
        kinds={kind: kinds.get(kind, 0) for kind in KINDS},
        verdicts={"good": num_good, "bad": judged.num_rows - num_good},
        splits=dict(sorted(Counter(kept["split"].to_pylist()).items())),
        prompts=len(pc.unique(kept["prompt_id"])),
        shards=_shards(rows),
        latents=tuple(_latents(latents_table(storage, f), f, singles) for f in fingerprints(storage, LATENTS)),
        text=tuple(_encoded(text_table(storage, f), f, "prompts") for f in fingerprints(storage, TEXT)),
    )


def _encoded_singles(table: Table) -> pa.Array:
    """Return the keys of kept single images."""
    where = (pc.field("status") == str(Status.KEPT)) & of_kind(JUDGED, PRIOR)
    return table.read(["pair_key"], where)["pair_key"].combine_chunks()


def _latents(table: Table, fingerprint: str, singles: pa.Array) -> EncodedFacts:
    """Return the facts of encoded pairs and single images.

    Args:
        table: The table of latents.
        fingerprint: Its fingerprint.
        singles: The keys of kept single images.
    """
    found = _encoded(table, fingerprint, "pairs")
    if not len(singles):
        return found
    keys = table.read(["pair_key"], pc.field("status") == str(Status.KEPT))["pair_key"]
    num_singles = pc.sum(pc.is_in(keys, value_set=singles)).as_py() or 0
    return replace(found, kept=found.kept - num_singles, singles=num_singles)


def describe_encoding(storage: Storage, latents: str, text: str) -> EncodingFacts:
    """Describe the encodings under two fingerprints, and their size."""
    pairs = latents_table(storage, latents).read(["pair_key", "status", "reason", "length"])
    texts = text_table(storage, text).read(["prompt_id", "status", "reason", "length", "num_tokens"])
    kept = pc.equal(pairs["status"], str(Status.KEPT))
    of_no_pair = pc.is_in(texts["prompt_id"], pa.array([NULL_PROMPT_ID, EMPTY_PROMPT_ID]))
    texts = texts.filter(pc.invert(of_no_pair))
    num_encoded, latents_bytes = pc.sum(kept).as_py() or 0, pc.sum(pairs["length"]).as_py() or 0
    is_single = pc.is_in(pairs["pair_key"], value_set=_encoded_singles(pairs_table(storage)))
    num_singles = pc.sum(pc.and_(kept, is_single)).as_py() or 0
    text_bytes, mean_text = pc.sum(texts["length"]).as_py() or 0, pc.mean(texts["length"]).as_py()
    reasons = Counter([*pairs["reason"].drop_null().to_pylist(), *texts["reason"].drop_null().to_pylist()])
    num_slots, num_images = _images(storage)
    max_tokens = CHUNK_TOKENS * int(noted_parts(storage, TEXT, text).get("prompt_chunks", 1)) + END_MARKS
    return EncodingFacts(
        pairs=num_encoded - num_singles,
        singles=num_singles,
        images=num_images,
        image_slots=num_slots,
        prompts=texts.num_rows,
        truncated_prompts=pc.sum(pc.greater(texts["num_tokens"], max_tokens)).as_py() or 0,
        max_tokens=max_tokens,
        longest_prompt=pc.max(texts["num_tokens"]).as_py() or 0,
        bytes_per_pair=MeanBytes(
            latents=latents_bytes / num_encoded if num_encoded else None,
            text=text_bytes / num_encoded if num_encoded else None,
            text_per_pair_storage=mean_text,
        ),
        quarantined=dict(sorted(reasons.items())),
    )


def _images(storage: Storage) -> tuple[int, int]:
    """Count the images of all kept rows, and the distinct ones in their shards."""
    rows = pairs_table(storage).read(
        ["shard", "image_0_sha256", "image_1_sha256"], pc.field("status") == str(Status.KEPT)
    )
    images = [rows.select(["shard", f"image_{side}_sha256"]).rename_columns(["shard", "image"]) for side in (0, 1)]
    listed = pa.concat_tables(images)
    listed = listed.filter(pc.is_valid(listed["image"]))  # a single image has no image 1
    return listed.num_rows, listed.group_by(["shard", "image"]).aggregate([]).num_rows


def _shards(rows: pa.Table) -> tuple[ShardFacts, ...]:
    placed = rows.filter(pc.is_valid(rows["shard"]))
    placed = placed.append_column("pairs", pc.equal(placed["kind"], PAIR))
    grouped = placed.group_by(SHARD).aggregate([([], "count_all"), ("pairs", "sum")])
    found = [
        ShardFacts(
            path=row["shard"],
            bytes=row["shard_bytes"],
            sha256=row["shard_sha256"],
            pairs=row["pairs_sum"],
            singles=row["count_all"] - row["pairs_sum"],
        )
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
