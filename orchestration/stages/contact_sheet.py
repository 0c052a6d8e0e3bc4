"""The contact sheet of encoding: some source images next to their decoded latents, for a check by eye.

A wrong VAE, a wrong type or a damaged file is visible at once; the peak signal-to-noise ratio puts a number on it.
Letters: B images, C channels, H rows, W columns, h and w of latents.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from pipelines.config import EncodeConfig
from pipelines.dataset.errors import unwrap
from pipelines.dataset.layout import latents_table, pairs_table
from pipelines.dataset.pair import Status
from pipelines.dataset.processes import TORCH_ENVIRONMENT
from pipelines.dataset.storage import Storage
from pipelines.encode.fingerprint import latents_fingerprint
from pipelines.encode.plan import with_absolute_paths
from pipelines.resources import uses_gpu

CONTACT = "encode"
NUM_PAIRS = 4
MAX_PIXELS_ON_CPU = 512 * 512  # of larger ones one pair: 1024 x 1024 takes a CPU the better part of a minute


@dataclass(frozen=True)
class Decoded:
    """One image of a pair, or a single one, before encoding and after decoding."""

    pair_key: str
    prompt: str
    side: int
    source_HWC: NDArray[np.uint8]
    decoded_HWC: NDArray[np.uint8]


def write_contact_sheet(config: EncodeConfig, storage: Storage, folder: str) -> list[dict[str, Any]]:
    """Decode some pairs on the cluster and write them below the run's `encode/`; needs a running Ray.

    Args:
        config: The section `encode` of the latents.
        storage: The data set's storage.
        folder: The run's folder.

    Returns:
        For each image its pair, side, prompt, bucket, PSNR in dB (None if no pixel differs) and the names of both PNGs.
    """
    import ray

    chosen = choose_pairs(storage, latents_fingerprint(config))
    environment = {"env_vars": TORCH_ENVIRONMENT}
    decode = ray.remote(num_cpus=1, num_gpus=int(uses_gpu(config.device)), runtime_env=environment)(_decode)
    try:
        decoded: list[Decoded] = ray.get(decode.remote(with_absolute_paths(config), storage, chosen))
    except ray.exceptions.RayError as error:
        raise unwrap(error) or error from error
    sheet = []
    for number, image in enumerate(decoded):
        names = {what: f"{CONTACT}/contact-{number:03d}-{what}.png" for what in ("source", "decoded")}
        storage.write(f"{folder}/{names['source']}", _png(image.source_HWC))
        storage.write(f"{folder}/{names['decoded']}", _png(image.decoded_HWC))
        ratio = psnr(image.source_HWC, image.decoded_HWC)
        about = {"pair_key": image.pair_key, "prompt": image.prompt, "side": image.side}
        bucket = list(image.source_HWC.shape[:2])
        sheet.append({**about, **names, "bucket": bucket, "psnr": ratio if math.isfinite(ratio) else None})
    return sheet


def choose_pairs(storage: Storage, fingerprint: str) -> list[dict[str, Any]]:
    """Choose pairs or single images of as many buckets as possible, the most frequent first; the same every time."""
    columns = ["pair_key", "shard", "offset", "length", "sha256", "bucket_height", "bucket_width"]
    table = latents_table(storage, fingerprint)
    rows = table.read(columns, pc.field("status") == str(Status.KEPT)).sort_by("pair_key")
    firsts = rows.group_by(["bucket_height", "bucket_width"]).aggregate([("pair_key", "min"), ([], "count_all")])
    buckets = firsts.sort_by([("count_all", "descending"), ("pair_key_min", "ascending")])
    keys = dict.fromkeys([*buckets["pair_key_min"].to_pylist()[:NUM_PAIRS], *rows["pair_key"][:NUM_PAIRS].to_pylist()])
    wanted = list(keys)[:NUM_PAIRS]
    found = {row["pair_key"]: row for row in rows.filter(pc.field("pair_key").isin(wanted)).to_pylist()}
    places = [f"{name}_{side}" for name in ("offset", "length") for side in (0, 1)]
    digests = ["image_0_sha256", "image_1_sha256"]
    where = pc.field("pair_key").isin(wanted) & (pc.field("status") == str(Status.KEPT))
    sources = pairs_table(storage).read(["pair_key", "prompt", "shard", *places, *digests], where).to_pylist()
    pairs = {row["pair_key"]: row for row in sources}
    return [{"latents": found[key], "pair": pairs[key]} for key in wanted if key in pairs]


def _decode(config: EncodeConfig, storage: Storage, chosen: list[dict[str, Any]]) -> list[Decoded]:
    """Decode the images of these pairs on the cluster, as far as memory allows."""
    import torch

    from pipelines.encode.encoders import load_vae, usable_device
    from pipelines.units.actor import is_out_of_memory

    device = usable_device()
    vae = load_vae(config.source).to(device)
    done: list[Decoded] = []
    for number, each in enumerate(chosen):
        pixels = each["latents"]["bucket_height"] * each["latents"]["bucket_width"]
        if number and device.type == "cpu" and pixels > MAX_PIXELS_ON_CPU:
            break
        try:
            with torch.no_grad():
                done += list(_decode_pair(vae, storage, each["pair"], each["latents"]))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
    return done


def _decode_pair(vae: Any, storage: Storage, pair: dict[str, Any], latents: dict[str, Any]) -> Iterator[Decoded]:
    import safetensors.torch
    import torch

    from pipelines.encode.geometry import open_image, place

    data = storage.read_range(latents["shard"], latents["offset"], latents["length"], latents["sha256"])
    tensors = safetensors.torch.load(data)
    for side in (0,) if pair["offset_1"] is None else (0, 1):  # a single image has no image 1
        place_in_tar = pair["shard"], pair[f"offset_{side}"], pair[f"length_{side}"], pair[f"image_{side}_sha256"]
        file = storage.read_range(*place_in_tar)
        source = place(open_image(file), (latents["bucket_height"], latents["bucket_width"])).pixels
        # Stored unscaled, so they go in as they are.
        images_BCHW = vae.decode(tensors[f"latents_{side}"][None].to(vae.device, torch.float32)).sample
        decoded_HWC = ((images_BCHW[0] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu()
        yield Decoded(pair["pair_key"], pair["prompt"], side, source, decoded_HWC.numpy())


def psnr(source: NDArray[Any], decoded: NDArray[Any], *, peak: float = 255) -> float:
    """Return the peak signal-to-noise ratio of two images in dB; infinite if they are equal.

    Args:
        source: One image.
        decoded: The other, of the same shape.
        peak: The range of their values: 255 for 8-bit images.
    """
    error = float(np.mean((source.astype(np.float64) - decoded) ** 2))
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    Image.fromarray(pixels).save(out := io.BytesIO(), "PNG")
    return out.getvalue()
