"""The plan of drawing: which samples are wanted, with which noise, and the units of those that are missing.

Needs neither Ray nor torch. Nothing depends on a position: a prompt that is added draws its own samples and no other.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.dataset.key_map import keys_of
from pipelines.dataset.layout import samples_table
from pipelines.dataset.storage import Storage
from pipelines.samples.drawing import WANTED_SCHEMA, Drawing
from pipelines.samples.prompts import Prompt
from pipelines.units.unit import Unit, unit_id

SAMPLES_A_UNIT = 32  # about: a unit is a multiple of the batch size
PLAIN = "plain"
FINGERPRINT = "fingerprint"
"""The column of a unit's rows that says which drawing they belong to."""


@dataclass(frozen=True)
class Variant:
    """A way to draw every prompt.

    Args:
        name: Its name in the column `variant`.
        prefix: Put before the prompt; the sample still belongs to the bare prompt.
    """

    name: str
    prefix: str


DEFAULT_VARIANTS = (Variant(PLAIN, ""),)


def noise_seed(seed: int, prompt_id: str, index: int, variant: str | None = None) -> int:
    """Return the seed of a sample's noise: 63 bits of a hash, never a position.

    Args:
        seed: The run's seed.
        prompt_id: The prompt, so that equal prompts have equal noise in every list.
        index: Which of the prompt's images it is.
        variant: The variant's name, if variants of a prompt have different noise.
    """
    named = "" if variant is None else f" {variant}"
    digest = hashlib.sha256(f"mapo-noise-1 {seed} {prompt_id} {index}{named}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def wanted_samples(
    prompts: Sequence[Prompt],
    fingerprint: str,
    *,
    seed: int,
    images_per_prompt: int,
    variants: Sequence[Variant] = DEFAULT_VARIANTS,
    shared_seed: bool = True,
) -> pa.Table:
    """Return the samples of these prompts as rows of `WANTED_SCHEMA`: by prompt, then variant, then index.

    Args:
        prompts: Prompts with distinct ids.
        fingerprint: From `samples_fingerprint`.
        seed: The run's seed.
        images_per_prompt: Images of each variant of a prompt.
        variants: The ways to draw a prompt.
        shared_seed: Whether the variants of a prompt share their noise, so that only the prefix differs.
    """
    keys, seeds = [], []
    for prompt in prompts:
        for variant in variants:
            text = variant.prefix + prompt.drawn
            for index in range(images_per_prompt):
                noise = noise_seed(seed, prompt.prompt_id, index, None if shared_seed else variant.name)
                keys.append(_sample_key(fingerprint, prompt.prompt_id, text, variant.name, index, noise))
                seeds.append(noise)
    num_variants = len(variants)
    of_prompt = np.repeat(np.arange(len(prompts)), num_variants * images_per_prompt)
    of_variant = np.tile(np.repeat(np.arange(num_variants), images_per_prompt), len(prompts))
    texts = pa.array([each.drawn for each in prompts], pa.string()).take(of_prompt)
    prefixes = pa.array([each.prefix for each in variants], pa.string()).take(of_variant)
    columns = {
        "sample_key": pa.array(keys, pa.string()),
        "text": pc.binary_join_element_wise(prefixes, texts, ""),
        "prompt": pa.array([each.prompt for each in prompts], pa.string()).take(of_prompt),
        "prompt_id": pa.array([each.prompt_id for each in prompts], pa.string()).take(of_prompt),
        "variant": pa.array([each.name for each in variants], pa.string()).take(of_variant),
        "index": np.tile(np.arange(images_per_prompt, dtype=np.int32), len(prompts) * num_variants),
        "seed": pa.array(seeds, pa.int64()),
    }
    return pa.table(columns, schema=WANTED_SCHEMA)


def _sample_key(fingerprint: str, prompt_id: str, text: str, variant: str, index: int, seed: int) -> str:
    """Return 32 hex digits of everything that shapes a sample."""
    named = f"mapo-sample-1 {fingerprint} {prompt_id} {index} {seed} {len(variant)} {variant} {text}"
    return hashlib.sha256(named.encode()).hexdigest()[:32]


def distinct_samples(*tables: pa.Table) -> pa.Table:
    """Return the rows of several tables of wanted samples, each sample once, in the order of first appearance."""
    rows = pa.concat_tables(tables).combine_chunks()
    if pc.count_distinct(rows["sample_key"]).as_py() == rows.num_rows:
        return rows
    numbered = pa.table({"sample_key": rows["sample_key"], "place": np.arange(rows.num_rows)})
    firsts = numbered.group_by("sample_key").aggregate([("place", "min")])["place_min"]
    return rows.take(np.sort(firsts.to_numpy()))


def unit_size(batch_size: int) -> int:
    """Return how many samples a unit has: whole batches, and about `SAMPLES_A_UNIT`."""
    return batch_size * max(1, round(SAMPLES_A_UNIT / batch_size))


def pending_samples(storage: Storage, drawing: Drawing, batch_size: int) -> list[Unit]:
    """Plan the units of the samples that are not in the table, drawn or quarantined.

    Units are cut from all wanted samples, and only then lose those that are there: after a crash, the units that are
    left, with their batches and their tars, are the ones of an undisturbed run.

    Args:
        storage: The data set's storage.
        drawing: The wanted samples.
        batch_size: Samples in one pipeline call.
    """
    wanted = distinct_samples(drawing.wanted)
    is_missing = _missing(storage, drawing.fingerprint, wanted)
    places = np.flatnonzero(is_missing)
    if not len(places):
        return []
    rows = wanted.filter(pa.array(is_missing))
    rows = rows.append_column(FINGERPRINT, pa.repeat(drawing.fingerprint, rows.num_rows))
    cuts = np.flatnonzero(np.diff(places // unit_size(batch_size))) + 1
    keys = keys_of(rows["sample_key"])
    units = []
    for start, end in zip([0, *cuts.tolist()], [*cuts.tolist(), rows.num_rows], strict=True):
        identity = unit_id("samples", drawing.fingerprint, hashlib.sha256(keys[start:end].tobytes()).hexdigest())
        units.append(Unit(identity, rows.slice(start, end - start)))
    return units


def count_missing(storage: Storage, drawing: Drawing) -> int:
    """Count the wanted samples that are not in the table, drawn or quarantined."""
    return int(_missing(storage, drawing.fingerprint, distinct_samples(drawing.wanted)).sum())


def _missing(storage: Storage, fingerprint: str, wanted: pa.Table) -> NDArray[np.bool_]:
    """Return for each wanted sample whether the table lacks it."""
    done = samples_table(storage, fingerprint).read(["sample_key"])["sample_key"]
    is_done = pc.is_in(wanted["sample_key"], done.combine_chunks())
    is_missing: NDArray[np.bool_] = ~is_done.to_numpy().astype(np.bool_)
    return is_missing
