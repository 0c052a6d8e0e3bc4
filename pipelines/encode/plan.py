"""The plan of encode: the units missing under the fingerprints, and whether the settings fit the model.

Reads tables and the model's files; needs neither Ray nor torch.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipelines.config import EncodeConfig
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.key_map import KeyMap, Keys, keys_of
from pipelines.dataset.layout import latents_table, pairs_table, text_table
from pipelines.dataset.model_files import SDXL, read_config, read_family
from pipelines.dataset.pair import EMPTY_PROMPT_ID, NULL_PROMPT_ID, Status
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.dataset.values import JsonObject
from pipelines.encode.fingerprint import fingerprint_of, latents_parts, text_parts
from pipelines.encode.geometry import bucket_list
from pipelines.units.unit import Unit, unit_id

PROMPTS_A_UNIT = 1024  # 0.3 GB of SDXL embeddings in float16

_IMAGE_COLUMNS = [
    "pair_key", "shard", "image_0_sha256", "image_1_sha256", "offset_0", "length_0", "offset_1", "length_1",
    "height_0", "width_0", "orientation_0", "height_1", "width_1", "orientation_1",
]  # fmt: skip
_KEPT = pc.field("status") == str(Status.KEPT)


@dataclass(frozen=True)
class Pending:
    """Pairs and prompts that are not encoded yet under the configuration's fingerprints."""

    num_kept: int
    """Kept pairs, encoded or not."""
    latents: list[Unit]
    texts: list[Unit]
    latents_parts: JsonObject
    text_parts: JsonObject

    @property
    def is_empty(self) -> bool:
        """Whether everything is encoded."""
        return not self.latents and not self.texts


def pending(config: EncodeConfig, storage: Storage, *, include_empty_prompt: bool = False) -> Pending:
    """Plan the missing units.

    Args:
        config: The section `encode`.
        storage: The data set's storage.
        include_empty_prompt: Whether the embedding of "" is needed in addition to those of the prompts.

    Raises:
        ModelError: The model is missing, damaged or of another family.
    """
    of_latents, of_text = latents_parts(config), text_parts(config)
    kept = pairs_table(storage).read([*_IMAGE_COLUMNS, "prompt_id"], _KEPT)
    if not kept.num_rows:
        return Pending(0, [], [], of_latents, of_text)
    return Pending(
        kept.num_rows,
        latent_units(kept.select(_IMAGE_COLUMNS), storage, fingerprint_of(of_latents)),
        text_units(
            kept["prompt_id"],
            storage,
            fingerprint_of(of_text),
            include_empty_prompt=include_empty_prompt,
            max_prompts=prompts_a_unit(config.prompt_chunks),
        ),
        of_latents,
        of_text,
    )


def pending_latents(storage: Storage, fingerprint: str) -> list[Unit]:
    """Plan the missing units of latents alone; there may be no pair yet."""
    kept = pairs_table(storage).read(_IMAGE_COLUMNS, _KEPT)
    return latent_units(kept, storage, fingerprint) if kept.num_rows else []


def is_encoded(config: EncodeConfig, storage: Storage, *, include_empty_prompt: bool = False) -> bool:
    """Return whether there are kept pairs, and all of them and their prompts are encoded; takes seconds.

    Args:
        config: The section `encode`.
        storage: The data set's storage.
        include_empty_prompt: Whether the embedding of "" is needed in addition to those of the prompts.

    Raises:
        ModelError: The model is missing, damaged or of another family.
    """
    pairs = pairs_table(storage)
    latents = latents_table(storage, fingerprint_of(latents_parts(config)))
    text = text_table(storage, fingerprint_of(text_parts(config)))
    if pairs.version is None or latents.version is None or text.version is None:
        return False
    kept = _distinct(pairs, "pair_key", _KEPT)
    if not len(kept) or not _holds(_distinct(latents, "pair_key"), kept):
        return False
    beside = [NULL_PROMPT_ID, EMPTY_PROMPT_ID] if include_empty_prompt else [NULL_PROMPT_ID]
    wanted = [_distinct(pairs, "prompt_id", _KEPT), keys_of(pa.array(beside))]
    return _holds(_distinct(text, "prompt_id"), np.concatenate(wanted))


def _distinct(table: Table, column: str, where: ds.Expression | None = None) -> Keys:
    """Return the keys in a column as pairs of integers; repeats within a batch count once."""
    found = [keys_of(batch.column(0).unique()) for batch in table.batches([column], where) if batch.num_rows]
    return np.concatenate(found) if found else keys_of(pa.array([], pa.string()))


def _holds(known: Keys, wanted: Keys) -> bool:
    """Return whether every wanted key is among the known ones."""
    marks = KeyMap()
    marks.add(known, np.zeros(len(known), np.float32))
    in_order = wanted[np.argsort(wanted[:, 0], kind="stable")]  # so that look-ups are near each other in memory
    return not np.isnan(marks.get(in_order)).any()


def latent_units(kept: pa.Table, storage: Storage, fingerprint: str) -> list[Unit]:
    """Plan one unit per pair shard that has pairs without latents: those pairs, in order."""
    done = latents_table(storage, fingerprint).read(["pair_key"])["pair_key"]
    missing = kept.filter(pc.invert(pc.is_in(kept["pair_key"], pa.array(done.unique()))))
    missing = missing.sort_by([("shard", "ascending"), ("offset_0", "ascending")]).combine_chunks()
    units, start = [], 0
    runs = pc.run_end_encode(missing["shard"].combine_chunks()) if missing.num_rows else None
    for end in [] if runs is None else runs.run_ends.to_pylist():
        rows = missing.slice(start, end - start)
        keys = sorted(rows["pair_key"].to_pylist())
        units.append(Unit(unit_id("latents", fingerprint, rows["shard"][0].as_py(), *keys), rows))
        start = end
    return units


def prompts_a_unit(prompt_chunks: int) -> int:
    """Return the number of prompts of a unit of text that take the memory of PROMPTS_A_UNIT of one chunk, or less.

    It is a power of two, so that passes begin at the same prompts whatever the number of chunks, and the bits of the
    first chunk are the same.
    """
    return PROMPTS_A_UNIT >> (prompt_chunks - 1).bit_length()


def text_units(
    kept_prompt_ids: pa.ChunkedArray,
    storage: Storage,
    fingerprint: str,
    *,
    include_empty_prompt: bool = False,
    max_prompts: int = PROMPTS_A_UNIT,
) -> list[Unit]:
    """Plan units of the distinct prompts (and the null conditioning) that have no embedding, sorted.

    The embedding of "", if it is needed, is alone in the last unit: the other units are the same with and without it.
    """
    wanted = pa.concat_arrays([pa.array([NULL_PROMPT_ID]), kept_prompt_ids.unique()])
    done = pa.array(text_table(storage, fingerprint).read(["prompt_id"])["prompt_id"].unique())
    missing = wanted.filter(pc.invert(pc.is_in(wanted, done)))
    units = _prompt_units(missing, storage, fingerprint, max_prompts) if len(missing) else []
    if include_empty_prompt and pc.index(done, EMPTY_PROMPT_ID).as_py() < 0:
        rows = pa.table({"prompt_id": [EMPTY_PROMPT_ID], "prompt": [""]})
        units.append(Unit(empty_unit_id(fingerprint), rows))
    return units


def empty_unit_id(fingerprint: str) -> str:
    """Return the id of the unit of the embedding of ""."""
    return unit_id("text", fingerprint, EMPTY_PROMPT_ID)


def _prompt_units(missing: pa.Array, storage: Storage, fingerprint: str, max_prompts: int) -> list[Unit]:
    found = pairs_table(storage).read(["prompt_id", "prompt"], _KEPT & pc.field("prompt_id").isin(missing))
    prompts = dict(zip(found["prompt_id"].to_pylist(), found["prompt"].to_pylist(), strict=True))
    identities = sorted(missing.to_pylist())
    units = []
    for start in range(0, len(identities), max_prompts):
        part = identities[start : start + max_prompts]
        rows = pa.table({"prompt_id": part, "prompt": pa.array([prompts.get(p, "") for p in part], pa.string())})
        units.append(Unit(unit_id("text", fingerprint, *part), rows))
    return units


def with_absolute_paths(config: EncodeConfig) -> EncodeConfig:
    """Return the configuration with local folders as absolute paths: workers have another working directory."""

    def absolute(model: str | None) -> str | None:
        folder = None if model is None else Path(model).expanduser()
        return str(folder.resolve()) if folder is not None and folder.is_dir() else model

    return config.model_copy(update={"model": absolute(config.model), "vae": absolute(config.vae)})


def check_settings(config: EncodeConfig) -> None:
    """Check the settings against the model before any work.

    Raises:
        ModelError: The model is missing or of another family.
        ConfigError: A bucket is not a multiple of the VAE's factor, or the VAE overflows in `vae_dtype`.
    """
    family = read_family(config.source.folder())
    vae = read_config(config.source.vae_folder() / "config.json")
    factor = 2 ** (len(vae.get("block_out_channels") or [0]) - 1)
    for height, width in bucket_list(config.resolution, config.buckets):
        if height % factor or width % factor:
            raise ConfigError(
                f"a bucket of {height} x {width} pixels is not divisible by {factor}, the factor of the VAE",
                f"set `encode.resolution` (or every side in `encode.buckets`) to a multiple of {max(factor, 64)}",
            )
    if config.vae_dtype == "float16" and vae.get("force_upcast", True):
        other = ", or `encode.vae` to madebyollin/sdxl-vae-fp16-fix" if family is SDXL else ""
        raise ConfigError(
            f"the VAE of {config.vae or config.model} sets `force_upcast` (the default): it overflows in float16",
            f"set `encode.vae_dtype` to float32, tf32 or bfloat16{other}",
        )
