"""Pair shards to latent and text shards: plan what is missing, encode it on Ray Data actors, commit it.

Invariants: what has a row under the fingerprint is never encoded again; a shard exists only once a row points to it;
a distinct prompt is embedded once, a distinct image of a shard once; the bytes of a unit are the same every time.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import EncodeConfig
from pipelines.dataset.errors import ConfigError, DropBudgetExceeded, SnapshotError, unwrap
from pipelines.dataset.layout import LATENTS, TEXT, latents_table, pairs_table, text_table
from pipelines.dataset.model_files import read_config, resolve_vae
from pipelines.dataset.pair import NULL_PROMPT_ID, Status
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.fingerprint import fingerprint_of, latents_parts, text_parts
from pipelines.geometry import bucket_list
from pipelines.progress import Progress, quiet_ray_data
from pipelines.unit_shard import from_ipc, to_ipc

PROMPTS_A_UNIT = 1024  # 0.3 GB of SDXL embeddings in float16
MAX_NON_FINITE_RATIO = 0.05  # more of a stage's rows quarantined than this: the model or the dtype is wrong
# Torch's threads spin while they wait for each other. Measured on two busy cores with two threads: 14 images/s
# spinning, 538 sleeping.
WAIT_PASSIVELY = {"OMP_WAIT_POLICY": "PASSIVE"}

_IMAGE_COLUMNS = [
    "pair_key", "shard", "image_0_sha256", "image_1_sha256", "offset_0", "length_0", "offset_1", "length_1",
]  # fmt: skip
_KEPT = pc.field("status") == str(Status.KEPT)


@dataclass(frozen=True)
class Unit:
    """Pairs of one shard, or distinct prompts: what one actor turns into one shard, committed whole."""

    id: str
    rows: pa.Table


@dataclass(frozen=True)
class Pending:
    """What is not encoded yet under the configuration's fingerprints."""

    num_kept: int
    """Kept pairs, encoded or not."""
    latents: list[Unit]
    texts: list[Unit]
    latents_parts: dict[str, Any]
    text_parts: dict[str, Any]

    @property
    def is_empty(self) -> bool:
        """Whether everything is encoded."""
        return not self.latents and not self.texts


def pending(config: EncodeConfig, storage: Storage) -> Pending:
    """Plan the missing units: reads tables and hashes the model's files; needs neither Ray nor torch.

    Raises:
        ModelError: The model is missing, damaged or not an SDXL pipeline.
    """
    of_latents, of_text = latents_parts(config), text_parts(config)
    kept = pairs_table(storage).read([*_IMAGE_COLUMNS, "prompt_id"], _KEPT)
    if not kept.num_rows:
        return Pending(0, [], [], of_latents, of_text)
    return Pending(
        kept.num_rows,
        latent_units(kept.select(_IMAGE_COLUMNS), storage, fingerprint_of(of_latents)),
        text_units(kept["prompt_id"], storage, fingerprint_of(of_text)),
        of_latents,
        of_text,
    )


def latent_units(kept: pa.Table, storage: Storage, fingerprint: str) -> list[Unit]:
    """One unit for every pair shard with pairs that have no latents: those pairs, by shard and place in it."""
    done = latents_table(storage, fingerprint).read(["pair_key"])["pair_key"]
    missing = kept.filter(pc.invert(pc.is_in(kept["pair_key"], pa.array(done.unique()))))
    missing = missing.sort_by([("shard", "ascending"), ("offset_0", "ascending")]).combine_chunks()
    units, start = [], 0
    runs = pc.run_end_encode(missing["shard"].combine_chunks()) if missing.num_rows else None
    for end in [] if runs is None else runs.run_ends.to_pylist():
        rows = missing.slice(start, end - start)
        keys = sorted(rows["pair_key"].to_pylist())
        units.append(Unit(_unit_id("latents", fingerprint, rows["shard"][0].as_py(), *keys), rows))
        start = end
    return units


def text_units(kept_prompt_ids: pa.ChunkedArray, storage: Storage, fingerprint: str) -> list[Unit]:
    """The distinct prompts (and the null conditioning) that have no embedding, sorted, so many to a unit."""
    wanted = pa.concat_arrays([pa.array([NULL_PROMPT_ID]), kept_prompt_ids.unique()])
    done = text_table(storage, fingerprint).read(["prompt_id"])["prompt_id"]
    missing = wanted.filter(pc.invert(pc.is_in(wanted, pa.array(done.unique()))))
    if not len(missing):
        return []
    found = pairs_table(storage).read(["prompt_id", "prompt"], _KEPT & pc.field("prompt_id").isin(missing))
    prompts = dict(zip(found["prompt_id"].to_pylist(), found["prompt"].to_pylist(), strict=True))
    identities = sorted(missing.to_pylist())
    units = []
    for start in range(0, len(identities), PROMPTS_A_UNIT):
        part = identities[start : start + PROMPTS_A_UNIT]
        rows = pa.table({"prompt_id": part, "prompt": pa.array([prompts.get(p, "") for p in part], pa.string())})
        units.append(Unit(_unit_id("text", fingerprint, *part), rows))
    return units


def _unit_id(*identity: str) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def encode(config: EncodeConfig, storage: Storage) -> None:
    """Bring latents and text embeddings up to date with the kept pairs. Needs a running Ray.

    Raises:
        ModelError: The model is missing, damaged or not an SDXL pipeline.
        SnapshotError: There is no kept pair.
        DropBudgetExceeded: More than `MAX_NON_FINITE_RATIO` of the rows were quarantined.
    """
    config = _located(config)
    todo = pending(config, storage)
    if not todo.num_kept:
        raise SnapshotError(
            f"there is no kept pair in {storage.uri('dataset/pairs')}, so there is nothing to encode",
            "run `mapo ingest` first; `mapo data show` lists what became of the rows",
        )
    _check_sizes(config)
    if not todo.is_empty:
        storage.check_writable()
    for stage in _stages(config, storage, todo):
        stage.run()


def _located(config: EncodeConfig) -> EncodeConfig:
    """Local folders as absolute paths: workers have another working directory."""

    def absolute(model: str | None) -> str | None:
        folder = None if model is None else Path(model).expanduser()
        return str(folder.resolve()) if folder is not None and folder.is_dir() else model

    return config.model_copy(update={"model": absolute(config.model), "vae": absolute(config.vae)})


def _check_sizes(config: EncodeConfig) -> None:
    """Every bucket divides by what the VAE divides by."""
    channels = read_config(resolve_vae(config.model, config.vae) / "config.json").get("block_out_channels") or [0]
    factor = 2 ** (len(channels) - 1)
    for height, width in bucket_list(config.resolution, config.buckets):
        if height % factor or width % factor:
            raise ConfigError(
                f"a bucket of {height} x {width} pixels does not divide by {factor}, the factor of the VAE",
                f"set `encode.resolution` to a multiple of {max(factor, 64)}",
            )


def _stages(config: EncodeConfig, storage: Storage, todo: Pending) -> Iterator["_Stage"]:
    """Text first: it is short, and a wrong text encoder should show before hours of images. Torch is loaded late."""
    name = fingerprint_of(todo.text_parts)
    yield _Stage(
        "text", "prompt", todo.texts, text_table(storage, name), f"{TEXT}/{name}", todo.text_parts, config, storage
    )
    name = fingerprint_of(todo.latents_parts)
    yield _Stage(
        "latents", "pair", todo.latents, latents_table(storage, name), f"{LATENTS}/{name}", todo.latents_parts,
        config, storage,
    )  # fmt: skip


@dataclass(frozen=True)
class _Stage:
    """One of the two executions: units in, committed rows out."""

    kind: str
    item: str
    units: list[Unit]
    table: Table
    folder: str
    parts: dict[str, Any]
    config: EncodeConfig
    storage: Storage

    def run(self) -> None:
        """Encode and commit the units, then hold the result against the limit of non-finite rows."""
        if self.units:
            self._note_parts()
            planned, dropped = sum(unit.rows.num_rows for unit in self.units), 0
            with Progress(f"encode {self.kind}", planned, f"{self.item}s") as progress:
                for unit, rows in self._encoded():
                    self.table.append(unit, rows)
                    progress.advance(rows.num_rows)
                    dropped += rows["status"].to_pylist().count(str(Status.QUARANTINED))
                    if dropped > MAX_NON_FINITE_RATIO * planned:
                        break  # more than the limit already, whatever the rest holds
        self._check_non_finite()

    def _note_parts(self) -> None:
        """What the fingerprint is made of, for people, beside the table."""
        name = f"{self.folder}/fingerprint.json"
        if not self.storage.exists(name):
            self.storage.write(name, json.dumps(self.parts, indent=2, sort_keys=True).encode() + b"\n")

    def _encoded(self) -> Iterator[tuple[str, pa.Table]]:
        """The rows of every unit as it is done, from a pool of actors."""
        import ray.data

        quiet_ray_data()
        resources, num_actors, num_threads = _divide_cluster(self.config.num_workers, len(self.units))
        items = [{"unit_id": unit.id, "rows": to_ipc(unit.rows)} for unit in self.units]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            self._actor(),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=num_actors),
            fn_constructor_args=(self.config, self.storage, self.folder.rsplit("/", 1)[1], num_threads),
            **resources,
        )
        try:
            # Nothing is fetched ahead: `iter_rows` would hand out a unit, to be committed, only once the next is done.
            for block in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
                for done in block.to_pylist():
                    yield done["unit_id"], from_ipc(done["rows"])
        except Exception as error:
            if (ours := unwrap(error)) is None:
                raise
            raise ours from error

    def _actor(self) -> Callable[[pa.Table], pa.Table]:
        if self.kind == "text":
            from pipelines.texts import WriteTexts

            return WriteTexts  # type: ignore[return-value]
        from pipelines.latents import WriteLatents

        return WriteLatents  # type: ignore[return-value]

    def _check_non_finite(self) -> None:
        rows = self.table.read(["status", "reason"])
        dropped = rows.filter(pc.equal(rows["status"], str(Status.QUARANTINED)))
        if dropped.num_rows <= MAX_NON_FINITE_RATIO * rows.num_rows:
            return
        (reason, times), *_ = Counter(dropped["reason"].to_pylist()).most_common(1)
        raise DropBudgetExceeded(
            f"encode ({self.kind}) dropped {dropped.num_rows:,} of {rows.num_rows:,} {self.item}s "
            f"({dropped.num_rows / rows.num_rows:.1%}, limit {MAX_NON_FINITE_RATIO:.1%}).\n"
            f"Most common reason: {reason} ({times:,}).",
            "numbers that are not finite come from damaged weights, or overflow the stored type: "
            "set `encode.dtype` to bfloat16 or float32, or `encode.vae` to another VAE",
        )


def _divide_cluster(num_workers: int, num_units: int) -> tuple[dict[str, Any], int, int]:
    """What an actor asks Ray for, how many of them there are, and the torch threads of each."""
    import ray

    cluster = ray.cluster_resources()
    num_cpus, num_gpus = int(cluster.get("CPU", 1)), int(cluster.get("GPU", 0))
    num_actors = max(1, min(num_workers, num_units, num_gpus or num_cpus))
    resources: dict[str, Any] = {"num_gpus": 1} if num_gpus else {"num_cpus": 1}
    resources["runtime_env"] = {"env_vars": WAIT_PASSIVELY}
    return resources, num_actors, max(1, num_cpus // num_actors)
