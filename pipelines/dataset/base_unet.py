"""Checks of a base model's UNet: its inputs, its outputs, and whether its weights fit its configuration."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from pipelines.dataset.base_config import OTHER_CONFIG, STEM, UNET_CLASS, WAY_OUT, whole_number, whole_numbers
from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import CHOOSE_A_BASE, Family, ModelSource, weight_files
from pipelines.dataset.safetensors_header import tensor_shapes, tensor_types
from pipelines.dataset.values import JsonObject

NUM_TIME_IDS, NUM_REFINER_TIME_IDS = 6, 5
OTHER_INPUTS = (
    ("an inpainting UNet", 2, 1),
    ("a UNet that edits images, such as InstructPix2Pix", 2, 0),
    ("a depth-conditioned UNet", 1, 1),
    ("an upscaler's UNet", 1, 3),
)
"""UNets that take more than noisy latents: multiples of the latent channels, and additional channels."""
NOT_GIVEN = {
    "time_cond_proj_dim": "a guidance scale, like a latent consistency model (LCM)",
    "class_embed_type": "class labels",
    "num_class_embeds": "class labels",
    "encoder_hid_dim": "another encoder's states",
    "encoder_hid_dim_type": "another encoder's states",
    "guidance_embeds": "a guidance scale",
}
"""Keys of a UNet's configuration that make it expect inputs that training does not provide."""
NOT_GIVEN_WEIGHTS = {
    "time_embedding.cond_proj.": "time_cond_proj_dim",
    "class_embedding.": "class_embed_type",
    "encoder_hid_proj.": "encoder_hid_dim",
}
"""Prefixes of the names of the weights that belong to such a key."""
TYPES = {"F32", "F16", "BF16"}
"""Types that weights may be stored in: others are quantized."""
ATTENDS = {"CrossAttnDownBlock2D": True, "CrossAttnUpBlock2D": True, "DownBlock2D": False, "UpBlock2D": False}


def check_unet(config: JsonObject, family: Family, channels: int, model: str) -> None:
    """Check that the UNet takes noisy latents, a timestep and the family's conditioning, and nothing else."""
    if (found := config.get("_class_name", UNET_CLASS)) != UNET_CLASS:
        raise ModelError(f"the unet of {model} is a {found}, not a {UNET_CLASS}", CHOOSE_A_BASE)
    taken, given = (whole_number(config, key, 4, "unet", model) for key in ("in_channels", "out_channels"))
    if taken != channels:
        kinds = [kind for kind, times, more in OTHER_INPUTS if times * channels + more == taken]
        raise ModelError(
            f"unet.in_channels of {model} is {taken}, but vae.latent_channels is {channels}"
            + (f": {kinds[0]}" if kinds else ""),
            f"{CHOOSE_A_BASE} that generates images from text alone"
            if kinds
            else "the UNet and the VAE belong to different models: choose a complete base, or another `encode.vae`",
        )
    if given != channels:
        learned = ": a UNet that also predicts a variance" if given == 2 * channels else ""
        raise ModelError(
            f"unet.out_channels of {model} is {given}, but vae.latent_channels is {channels}{learned}",
            CHOOSE_A_BASE,
        )
    _check_conditioning(config, family, model)


def _check_conditioning(config: JsonObject, family: Family, model: str) -> None:
    """Check that the UNet expects nothing but the family's conditioning, and weights that are not quantized."""
    for key, what in NOT_GIVEN.items():
        if config.get(key):
            raise ModelError(
                f"unet.{key} of {model} is {config[key]}: the UNet expects {what}, which training does not provide",
                f"choose the base that it was made from; {CHOOSE_A_BASE}",
            )
    for key, usual in (("time_embedding_type", "positional"), ("attention_type", "default")):
        if (found := config.get(key) or usual) != usual:
            raise ModelError(f"unet.{key} of {model} is {found}; training supports {usual}", CHOOSE_A_BASE)
    if config.get("quantization_config"):
        raise ModelError(
            f"unet.quantization_config of {model} is set: its weights are quantized, but training needs full precision",
            "choose the base that it was made from",
        )
    expected = "text_time" if family.has_pooled else None
    if (found := config.get("addition_embed_type")) != expected:
        raise ModelError(
            f"unet.addition_embed_type of {model} is {found}, not {expected} as in every {family.title} base",
            CHOOSE_A_BASE,
        )


def check_text_width(config: JsonObject, widths: Sequence[tuple[int, int]], family: Family, model: str) -> None:
    """Check that the UNet's width is the sum of the text encoders', and that SDXL's takes six time ids.

    Args:
        config: The UNet's configuration.
        widths: Hidden size and projection of each text encoder.
        family: The base's family.
        model: The base, for messages.
    """
    width = sum(hidden for hidden, _ in widths)
    dims = config.get("cross_attention_dim", 1280)
    for dim in dims if isinstance(dims, list) else [dims]:
        if dim != width:
            raise ModelError(
                f"unet.cross_attention_dim of {model} is {dim}, but its text encoders have "
                f"{' + '.join(str(hidden) for hidden, _ in widths)}{f' = {width}' if len(widths) > 1 else ''} "
                "(hidden_size)",
                "these are not the text encoders that the UNet was trained with; choose a complete base",
            )
    if family.has_pooled:
        _check_time_ids(config, widths[-1][1], model)


def _check_time_ids(config: JsonObject, pooled: int, model: str) -> None:
    """Check that the UNet takes six time ids and the pooled embedding of the last text encoder."""
    each, found = (config.get(key) for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"))
    if type(each) is not int or found != NUM_TIME_IDS * each + pooled:
        is_refiner = type(each) is int and found == NUM_REFINER_TIME_IDS * each + pooled
        raise ModelError(
            f"unet.projection_class_embeddings_input_dim of {model} is {found}, not {NUM_TIME_IDS} x "
            f"addition_time_embed_dim + text_encoder_2.projection_dim = {NUM_TIME_IDS} x {each} + {pooled}"
            + (": a refiner, which takes five time ids" if is_refiner else ""),
            "choose SDXL's base, not its refiner" if is_refiner else CHOOSE_A_BASE,
        )


def check_unet_weights(part: Path, config: JsonObject, source: ModelSource) -> None:
    """Check that the weights belong to the UNet that the configuration describes; loading would not notice."""
    files = weight_files(part, STEM, source.variant)
    if others := sorted(tensor_types(files) - TYPES):
        raise ModelError(
            f"the weights of the unet of {source.model} are stored as {', '.join(others)}; training reads "
            f"{', '.join(sorted(TYPES))}",
            "choose a base in float32 or in 16 bits",
        )
    shapes = tensor_shapes(files)
    blocks = whole_numbers(config, "block_out_channels", [320, 640, 1280, 1280], "unet", source.model)
    for name, axis, key, value in _expected_shapes(config, blocks, shapes):
        if name not in shapes:
            raise ModelError(f"{name} is missing from the weights of the unet of {source.model}", WAY_OUT)
        if len(shapes[name]) <= axis or shapes[name][axis] != value:
            raise ModelError(
                f"unet.{key} of {source.model} is {value}, but {name} has the shape {list(shapes[name])}: "
                "config.json does not belong to these weights",
                OTHER_CONFIG,
            )
    _check_blocks(config, shapes, len(blocks), source.model)
    for begin, key in NOT_GIVEN_WEIGHTS.items():
        if not config.get(key) and any(name.startswith(begin) for name in shapes):
            what = NOT_GIVEN[key]
            raise ModelError(
                f"the weights of the unet of {source.model} contain {begin}*, but unet.{key} is not set: the UNet "
                f"expects {what}, which training does not provide",
                f"choose the base that it was made from; {CHOOSE_A_BASE}",
            )


def _expected_shapes(
    config: JsonObject, blocks: Sequence[int], names: Iterable[str]
) -> list[tuple[str, int, str, Any]]:
    """List what a configuration implies for its weights: a tensor, its axis, the key, and the size under that key."""
    expected: list[tuple[str, int, str, Any]] = [
        ("conv_in.weight", 1, "in_channels", config.get("in_channels", 4)),
        ("conv_in.weight", 0, "block_out_channels[0]", blocks[0]),
        ("conv_out.weight", 0, "out_channels", config.get("out_channels", 4)),
    ]
    for number, channels in enumerate(blocks):
        name = f"down_blocks.{number}.resnets.0.conv1.weight"
        expected.append((name, 0, f"block_out_channels[{number}]", channels))
    if config.get("addition_embed_type") == "text_time":
        key = "projection_class_embeddings_input_dim"
        expected.append(("add_embedding.linear_1.weight", 1, key, config.get(key)))
    dims = config.get("cross_attention_dim", 1280)
    attention = sorted(name for name in names if name.endswith(".attn2.to_k.weight"))
    if not isinstance(dims, list):
        expected += [(name, 1, "cross_attention_dim", dims) for name in attention]
    return expected


def _check_blocks(config: JsonObject, names: Collection[str], num_blocks: int, model: str) -> None:
    """Check that the weights have the layers in the configuration, and no others.

    diffusers drops weights that are not in the configuration, such as all attention of a block.
    """
    layers = config.get("layers_per_block", 2)
    each = layers if isinstance(layers, list) else [layers] * num_blocks
    if len(each) != num_blocks or not all(type(count) is int for count in each):
        raise ModelError(
            f"unet.layers_per_block of {model} is {layers}, not a whole number or one for each block", WAY_OUT
        )
    for side, counts in (("down", each), ("up", [count + 1 for count in reversed(each)])):
        types = config.get(f"{side}_block_types")
        if types is None:
            continue
        if not isinstance(types, list) or len(types) != num_blocks:
            raise ModelError(
                f"unet.{side}_block_types of {model} is {types}, but block_out_channels has {num_blocks}", WAY_OUT
            )
        for number, (kind, count) in enumerate(zip(types, counts, strict=True)):
            _check_block(f"{side}_blocks.{number}", kind, count, names, layers, model)


def _check_block(block: str, kind: str, count: int, names: Collection[str], layers: Any, model: str) -> None:
    """Check the layers and the attention of one block of the UNet.

    Args:
        block: Prefix of the names of its weights, such as `down_blocks.0`.
        kind: The block's class in the configuration.
        count: Its number of layers in the configuration.
        names: The names of all weights.
        layers: `layers_per_block`, for messages.
        model: The base, for messages.
    """
    found = {name.split(".")[3] for name in names if name.startswith(f"{block}.resnets.")}
    if len(found) != count:
        raise ModelError(
            f"unet.layers_per_block of {model} is {layers}, but the weights of {block} have {len(found)} layers, not "
            f"{count}: config.json does not belong to these weights",
            OTHER_CONFIG,
        )
    has_attention = any(name.startswith(f"{block}.attentions.") for name in names)
    if kind in ATTENDS and ATTENDS[kind] != has_attention:
        side, number = block.split("_blocks.")
        raise ModelError(
            f"unet.{side}_block_types[{number}] of {model} is {kind}, but the weights of that block have "
            f"{'' if has_attention else 'no '}attention: config.json does not belong to these weights",
            OTHER_CONFIG,
        )
