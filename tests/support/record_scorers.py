"""Record what the official code of scorers computes, for tests that need none of it.

    PYTHONPATH=.:tests/support:PACKAGES python tests/support/record_scorers.py SOURCES tests/data/scorers

SOURCES holds checkouts of HPSv2 (866735e), ImageReward (c1392c6), CSD (3a9df32) and improved-aesthetic-predictor
(6934dd8) under `<owner>+<name>`; PACKAGES holds open_clip_torch's dependencies timm, torchvision and ftfy. The models
are tiny, with weights from a formula. Where today's libraries lack what the official code imports, a stand-in is put in
its place; on the path of a number lie two, with the formulas of transformers 4: chunking (of one chunk) and the mask of
the image (all ones, which adds 0).

Without an official script: PickScore (its README's formula is transformers' own CLIP, a test of its own), DreamBooth's
metrics (unpublished; DINO's model and the usual transform stand in), Gram (torchvision's features alone), OneIG's
maximum over references.
"""

import ast
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from scorer_twins import (
    BERT_VOCAB,
    HPS_PROMPTS,
    PROMPTS,
    SIZES,
    fill,
    formula_image,
    formula_tensor,
    thin,
    write_bert_tokenizer,
)

import benchmarks.torchvision_stub  # noqa: F401 - declares what torchvision misses beside a torch for CPUs


def package(name: str, folder: Path) -> None:
    """Make a folder importable as a package without running its `__init__`."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def stand_ins() -> None:
    """Put names in place that the official code imports and today's libraries no longer have."""
    import transformers
    import transformers.modeling_utils as modeling_utils
    import transformers.utils.logging

    transformers.logging = transformers.utils.logging
    fairscale = "fairscale.nn.checkpoint.checkpoint_activations"
    for depth in range(1, 5):
        name = ".".join(fairscale.split(".")[:depth])
        sys.modules[name] = types.ModuleType(name)
    sys.modules[fairscale].checkpoint_wrapper = lambda module: module  # type: ignore[attr-defined]
    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        if not hasattr(modeling_utils, name):
            setattr(modeling_utils, name, lambda function, _size, _dim, *tensors: function(*tensors))
    hub = types.ModuleType("timm.models.hub")
    hub.download_cached_file = None  # type: ignore[attr-defined]
    sys.modules.setdefault("timm.models.hub", hub)


def record_hps(sources: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Run HPSv2's transform with and without antialiasing, its tokenizer, and its model."""
    package("hps", sources / "tgxs002+HPSv2" / "hpsv2" / "src" / "open_clip")
    transform, tokenizer, model = (
        importlib.import_module(f"hps.{name}") for name in ("transform", "tokenizer", "model")
    )
    official = transform.image_transform(224, is_train=False, resize_longest_max=True)
    images = [formula_image(*size, seed) for seed, size in enumerate(SIZES)]
    tensors = {f"hps-224-antialias.{place}": thin(official(image)) for place, image in enumerate(images)}
    resize = transform.F.resize
    transform.F.resize = lambda image, size, mode: resize(image, size, mode, antialias=False)
    tensors |= {f"hps-224-noantialias.{place}": thin(official(image)) for place, image in enumerate(images)}
    transform.F.resize = resize
    tower = {"width": 64, "layers": 2}
    clip = model.CLIP(
        32,
        {**tower, "image_size": 224, "patch_size": 32, "head_width": 64},
        {**tower, "heads": 1, "vocab_size": 49408, "context_length": 77},
        output_dict=True,
    ).eval()
    shapes = fill(clip)
    ids = tokenizer.tokenize(HPS_PROMPTS)
    with torch.no_grad():
        outputs = clip(torch.stack([official(image) for image in images[: len(HPS_PROMPTS)]]), ids)
        scores = torch.diagonal(outputs["image_features"] @ outputs["text_features"].T).tolist()
    return {
        "hps": {"shapes": shapes, "ids": [[i for i in row if i] for row in ids.tolist()], "scores": scores}
    }, tensors


def record_imagereward(sources: Path, scratch: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Run ImageReward's own `score` and `inference_rank` over its own vision and text towers."""
    from transformers import BertTokenizer

    root = sources / "THUDM+ImageReward" / "ImageReward"
    for name, folder in (("ir", root), ("ir.models", root / "models"), ("ir.models.BLIP", root / "models" / "BLIP")):
        package(name, folder)
    vit, med, blip, reward = (
        importlib.import_module(f"ir.{name}")
        for name in ("models.BLIP.vit", "models.BLIP.med", "models.BLIP.blip", "ImageReward")
    )
    vocab = write_bert_tokenizer(scratch) / "vocab.txt"
    blip.BertTokenizer = types.SimpleNamespace(from_pretrained=lambda _: _Tokenizer(BertTokenizer(str(vocab))))
    config = med.BertConfig(
        vocab_size=len(BERT_VOCAB) + 2, hidden_size=64, num_hidden_layers=2, num_attention_heads=1,
        intermediate_size=128, max_position_embeddings=64, add_cross_attention=True, encoder_width=64,
        layer_norm_eps=1e-12, is_decoder=False,
    )  # fmt: skip
    for method in ("get_head_mask", "invert_attention_mask"):
        if not hasattr(med.BertModel, method):
            setattr(med.BertModel, method, globals()[f"_{method}"])
    med.BertModel.all_tied_weights_keys = {}
    model = reward.ImageReward.__new__(reward.ImageReward)
    torch.nn.Module.__init__(model)
    model.device, model.preprocess, model.mean, model.std = (
        "cpu",
        reward._transform(224),
        0.16717362830052426,
        1.0333394966054072,
    )
    model.blip = torch.nn.Module()
    model.blip.visual_encoder = vit.VisionTransformer(224, 32, embed_dim=64, depth=2, num_heads=1)
    model.blip.text_encoder = med.BertModel(config, add_pooling_layer=False)
    model.blip.tokenizer = blip.init_tokenizer()
    model.mlp = reward.MLP(64)
    model.eval()
    shapes = fill(model)
    images = [formula_image(*size, seed) for seed, size in enumerate(SIZES)]
    with torch.no_grad():
        scores = [model.score(prompt, image) for prompt, image in zip(PROMPTS, images, strict=False)]
    prepared = {f"clip-224.{place}": thin(model.preprocess(image)) for place, image in enumerate(images)}
    return {"imagereward": {"shapes": shapes, "scores": scores}}, prepared


class _Tokenizer:
    """BERT's tokenizer with the two methods of old that the official code calls."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.additional_special_tokens_ids = tokenizer, [len(BERT_VOCAB) + 1]

    def add_special_tokens(self, _tokens: Any) -> None:
        """Add nothing: the two tokens are of no prompt."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._tokenizer(*arguments, **options)


def _get_head_mask(_self: Any, _mask: Any, num_layers: int, *_rest: Any) -> list[None]:
    return [None] * num_layers


def _invert_attention_mask(_self: Any, mask_BS: torch.Tensor) -> torch.Tensor:
    return (1.0 - mask_BS[:, None, None, :].float()) * torch.finfo(torch.float32).min


def record_csd(sources: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Run CSD's model over OpenAI's vision tower, and its transform."""
    root = sources / "learn2phoenix+CSD"
    package("csd", root / "CSD")
    package("csd_clip", root / "models" / "clip")
    tower = importlib.import_module("csd_clip.model").VisionTransformer(
        224, 32, width=64, layers=2, heads=1, output_dim=32
    )
    sys.modules["clip"] = types.ModuleType("clip")
    sys.modules["clip"].load = lambda _: (types.SimpleNamespace(visual=tower), None)  # type: ignore[attr-defined]
    model = importlib.import_module("csd.model").CSD_CLIP().eval()
    transform = importlib.import_module("csd.loss_utils").transforms_branch0
    shapes = fill(model)
    images = torch.stack([transform(formula_image(*size, seed)) for seed, size in enumerate(SIZES)])
    with torch.no_grad():
        _, _, style_BD = model(images)
    return {"csd": {"shapes": shapes}}, {"csd.style": style_BD}


def record_dino(sources: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Run DINO's vision transformer, of which CSD's repository holds a copy, and the usual transform."""
    from torchvision import transforms

    package("csd_models", sources / "learn2phoenix+CSD" / "models")
    dino = importlib.import_module("csd_models.dino_vits")
    model = dino.VisionTransformer(
        img_size=[224], patch_size=32, embed_dim=64, depth=2, num_heads=1, qkv_bias=True, num_classes=0
    ).eval()
    shapes = fill(model)
    transform = transforms.Compose([
        transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    images = [transform(formula_image(*size, seed)) for seed, size in enumerate(SIZES)]
    with torch.no_grad():
        embeds_BD = model(torch.stack(images))
    prepared = {f"dino-224.{place}": thin(image) for place, image in enumerate(images)}
    return {"dino": {"shapes": shapes}}, {"dino.embeds": embeds_BD, **prepared}


def record_vgg() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Run torchvision's VGG-19 with few channels; the Gram distance is written out as a sum over elements."""
    from torchvision.models import vgg

    plan = [4 if isinstance(each, int) else each for each in vgg.cfgs["E"]]
    features = vgg.make_layers(plan).eval()
    holder = torch.nn.Module()
    holder.features = features
    shapes = fill(holder)
    images = [formula_image(512, 512, seed) for seed in range(2)]
    transform = vgg.VGG19_Weights.IMAGENET1K_V1.transforms(crop_size=512, resize_size=512)
    values_BCHW, wanted = torch.stack([transform(image) for image in images]), (1, 6, 11, 20, 29)
    distances = []
    with torch.no_grad():
        for place, layer in enumerate(features):
            values_BCHW = layer(values_BCHW)
            if place in wanted:
                doubles = values_BCHW.double()
                grams = torch.einsum("bchw,bdhw->bcd", doubles, doubles) / doubles[0].numel()
                distances.append(((grams[0] - grams[1]) ** 2).mean().item())
    return {"vgg": {"shapes": shapes, "distance": sum(distances) / len(distances)}}, {}


def record_aesthetic(sources: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Run the head of `simple_inference.py` with the published weights, and with weights of the formula."""
    folder = sources / "christophschuhmann+improved-aesthetic-predictor"
    tree = ast.parse((folder / "simple_inference.py").read_text())
    wanted = [node for node in tree.body if getattr(node, "name", None) in ("MLP", "normalized")]
    names: dict[str, Any] = {
        "nn": torch.nn,
        "pl": types.SimpleNamespace(LightningModule=torch.nn.Module),
        "torch": torch,
    }
    exec(compile(ast.Module(wanted, []), "simple_inference.py", "exec"), names)
    head = names["MLP"](768).eval()
    embeds_BD = formula_tensor("aesthetic.embeds", (5, 768)) * 40
    unit_BD = torch.from_numpy(names["normalized"](embeds_BD.numpy())).float()
    shapes = fill(head)
    with torch.no_grad():
        formula = head(unit_BD).flatten().tolist()
        head.load_state_dict(
            torch.load(folder / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True, map_location="cpu")
        )
        published = head(unit_BD).flatten().tolist()
    return {"aesthetic": {"shapes": shapes, "scores": formula, "published_scores": published}}, {}


def main(sources: Path, target: Path) -> None:
    """Write the two files."""
    from safetensors.torch import save_file

    stand_ins()
    target.mkdir(parents=True, exist_ok=True)
    records: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for record, found in (
        record_hps(sources),
        record_imagereward(sources, target / ".scratch"),
        record_csd(sources),
        record_dino(sources),
        record_vgg(),
        record_aesthetic(sources),
    ):
        records |= record
        tensors |= found
    (target / "recorded.json").write_text(json.dumps(records, indent=None, separators=(",", ":")) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "recorded.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
