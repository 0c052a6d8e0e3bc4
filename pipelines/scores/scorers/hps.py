"""HPSv2 and HPSv2.1: CLIP ViT-H/14 trained on HPDv2, with an image letterboxed and a prompt cleaned by ftfy.

The official transform resizes a float tensor without saying whether to antialias, so that the number depends on the
version of torchvision: none before 0.17, antialiased since. `hpsv2` and `hpsv2.1` antialias; `-noantialias` are what
older installations print. The two differ by more than methods do, so never compare across names.
"""

from typing import ClassVar

from pipelines.scores.scorers.cosine import CosineScorer


class HpsV20(CosineScorer):
    """HPSv2.0 as torchvision 0.17 and newer resize.

    score = 100 * cos(image, prompt), as the benchmark prints; `hpsv2.score` returns a hundredth.
    Source: tgxs002/HPSv2, hpsv2/img_score.py and hpsv2/src/open_clip/transform.py. It runs under fp16 autocast on a
    GPU; this is float32.
    """

    name: ClassVar[str] = "hpsv2"
    description: ClassVar[str] = "Which image would people prefer for this prompt? (HPSv2.0)"
    scale: ClassVar[str] = "100 cos, about 20 to 30"
    parts: ClassVar[tuple[str, ...]] = ("hps-v2.0", "clip-tokenizer")
    preprocessing: ClassVar[str] = "hps-224-antialias"
    as_open_clip: ClassVar[bool] = True


class HpsV20NoAntialias(HpsV20):
    """HPSv2.0 as torchvision before 0.17 resizes."""

    name: ClassVar[str] = "hpsv2-noantialias"
    description: ClassVar[str] = "HPSv2.0 as old installations print it, without antialiasing"
    preprocessing: ClassVar[str] = "hps-224-noantialias"


class HpsV21(HpsV20):
    """HPSv2.1 as torchvision 0.17 and newer resize."""

    name: ClassVar[str] = "hpsv2.1"
    description: ClassVar[str] = "Which image would people prefer for this prompt? (HPSv2.1)"
    scale: ClassVar[str] = "100 cos, about 20 to 33"
    parts: ClassVar[tuple[str, ...]] = ("hps-v2.1", "clip-tokenizer")


class HpsV21NoAntialias(HpsV21):
    """HPSv2.1 as torchvision before 0.17 resizes."""

    name: ClassVar[str] = "hpsv2.1-noantialias"
    description: ClassVar[str] = "HPSv2.1 as old installations print it, without antialiasing"
    preprocessing: ClassVar[str] = "hps-224-noantialias"
