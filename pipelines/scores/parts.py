"""The table of weights: which files each part of a scorer comes from, and under which licence.

A part is one model, tokenizer or head; scorers name their parts, and may share them. A digest is given where the file
itself was seen; elsewhere `fetch` records the digest of what it brought. Light: neither torch nor transformers.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    """One file of a part.

    Args:
        name: Its name on the hub, or the last component of `url`.
        also: Other names under which the same content is published, in order of preference.
        url: Where it is, if not on the hub.
        sha256: Digests of the published forms that were seen; empty if none was.
    """

    name: str
    also: tuple[str, ...] = ()
    url: str | None = None
    sha256: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in order of preference."""
        return (self.name, *self.also)


@dataclass(frozen=True)
class Part:
    """One model, tokenizer or head.

    Args:
        repo: The hub repository of its files.
        files: Its files; the weights first.
        licence: The licence of the files, as their publisher states it.
        convert: The conversion of the weights; `copy` keeps names and values.
        revision: Branch, tag or commit on the hub. `main` where no commit was seen: the resolved one is recorded.
    """

    repo: str | None
    files: tuple[File, ...]
    licence: str
    convert: str = "copy"
    revision: str = "main"
    is_bfloat16: bool = False
    """Whether it was published in bfloat16; elsewhere that type means that somebody has rounded the weights."""

    @property
    def is_sharded(self) -> bool:
        """Whether its weights are in several files, which keep their names."""
        return sum(file.name.endswith(WEIGHTS) for file in self.files) > 1

    @property
    def has_model(self) -> bool:
        """Whether it has weights; a tokenizer has none."""
        return self.files[0].name.endswith(WEIGHTS)


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".p")
MODEL = "model.safetensors"
CLIP_FILES = (File(MODEL, also=("pytorch_model.bin",)), File("config.json"))
SAC_LOGOS_AVA = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/6934dd8/sac%2Blogos%2Bava1-l14-linearMSE.pth"
BLIP_VQA = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_base_vqa_capfilt_large.pth"
Q16_PROMPTS = "https://github.com/ml-research/i2p/raw/5176a1e/checkpoints/Q16-prompt/prompts.p"
VGG19 = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"

QWEN_PROCESSOR = (File("tokenizer.json"), File("tokenizer_config.json"), File("preprocessor_config.json"))


def _shards(count: int) -> tuple[File, ...]:
    """Return the files of a model whose weights are in several, as transformers names them."""
    names = (f"model-{place:05d}-of-{count:05d}.safetensors" for place in range(1, count + 1))
    return (*map(File, names), File("model.safetensors.index.json"), File("config.json"))


PARTS = {
    "clip-tokenizer": Part("openai/clip-vit-large-patch14", (File("vocab.json"), File("merges.txt")), "MIT"),
    "bert-tokenizer": Part("google-bert/bert-base-uncased", (File("vocab.txt"),), "Apache-2.0"),
    "clip-b32-openai": Part("openai/clip-vit-base-patch32", CLIP_FILES, "MIT"),
    "clip-l14-openai": Part("openai/clip-vit-large-patch14", CLIP_FILES, "MIT"),
    "clip-h14-laion": Part("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", CLIP_FILES, "MIT"),
    "pickscore-v1": Part("yuvalkirstain/PickScore_v1", CLIP_FILES, "MIT"),
    "hps-v2.0": Part("xswu/HPSv2", (File("HPS_v2_compressed.pt"),), "Apache-2.0", "open_clip"),
    "hps-v2.1": Part("xswu/HPSv2", (File("HPS_v2.1_compressed.pt"),), "Apache-2.0", "open_clip"),
    "imagereward-v1.0": Part("THUDM/ImageReward", (File("ImageReward.pt"),), "Apache-2.0", "imagereward"),
    "aesthetic-sac-logos-ava1": Part(
        None,
        (
            File(
                "sac+logos+ava1-l14-linearMSE.pth",
                also=("sac-logos-ava1-l14-affine.safetensors",),
                url=SAC_LOGOS_AVA,
                sha256=(
                    "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
                    "f152594cec2a4a926b167f68352e3c3146a6d34e56ed121a16facad554605968",
                ),
            ),
        ),
        "Apache-2.0",
        "affine",
    ),
    "dino-vits16": Part("facebook/dino-vits16", CLIP_FILES, "Apache-2.0"),
    "csd-vit-l": Part(
        "tomg-group-umd/CSD-ViT-L", (File(MODEL, also=("pytorch_model.bin", "checkpoint.pth")),), "MIT", "csd"
    ),
    "blip-vqa-capfilt-large": Part(
        None, (File("model_base_vqa_capfilt_large.pth", url=BLIP_VQA),), "BSD-3-Clause", "blip_vqa"
    ),
    "q16-prompts": Part(None, (File("prompts.p", url=Q16_PROMPTS),), "MIT", "q16"),
    "hpsv3": Part("MizzenAI/HPSv3", (File("HPSv3.safetensors"),), "MIT", is_bfloat16=True),
    "qwen2-vl-7b": Part("Qwen/Qwen2-VL-7B-Instruct", _shards(5), "Apache-2.0", is_bfloat16=True),
    "qwen3-vl-2b": Part("Qwen/Qwen3-VL-2B-Instruct", CLIP_FILES, "Apache-2.0", is_bfloat16=True),
    "qwen3-vl-8b": Part("Qwen/Qwen3-VL-8B-Instruct", _shards(4), "Apache-2.0", is_bfloat16=True),
    "qwen2-vl-processor": Part("Qwen/Qwen2-VL-7B-Instruct", (*QWEN_PROCESSOR, File("config.json")), "Apache-2.0"),
    "qwen3-vl-processor": Part("Qwen/Qwen3-VL-8B-Instruct", QWEN_PROCESSOR, "Apache-2.0"),
    "mask2former-swin-s-coco": Part("facebook/mask2former-swin-small-coco-instance", CLIP_FILES, "MIT"),
    "vgg19-features": Part(None, (File("vgg19-dcbb9e9d.pth", url=VGG19),), "BSD-3-Clause", "vgg"),
}
"""The parts by name. Weights under AGPL or for non-commercial use alone are not in this table."""
