"""HPSv3: Qwen2-VL-7B with a head for human preference."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.dataset.values import JsonObject
from pipelines.scores.scorers.qwen import QwenScorer
from pipelines.scores.scorers.result import Score

if TYPE_CHECKING:
    from PIL.Image import Image

NUM_PIXELS = 256 * 28 * 28
"""Pixels of every image, as nearly as multiples of 28 come; the same number is the least and the most."""
PROMPT = "{text_prompt}"
INSTRUCTION = "\n".join(
    (
        "",
        "You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a "
        "overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst "
        "and 10 being the best. ",
        "",
        "**Visual Quality:**  ",
        "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:",
        "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as "
        "abnormal body structures or nonsensical environmental setups.",
        "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
        "interpret, with no blurring or indistinct areas.",
        "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual "
        "elements (e.g., hair, clothing, shadows).",
        "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
        "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of "
        "harmony and balance.",
        "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or "
        "adult material. If such content is present, the image quality and satisfaction score should be the lowest "
        "possible. ",
        "",
        "**Text Alignment:**  ",
        "Assess how well the image matches the textual prompt across the following sub-dimensions:",
        "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) "
        "align with the textual description. The subject should match the description in terms of number, appearance, "
        "and behavior.",
        "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well "
        "the image adheres to this style.",
        "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image "
        "logically fit the scenario described in the prompt. The environment should support and enhance the subject "
        "without contradictions.",
        "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
        "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be "
        "acceptable, but critical attributes should be preserved.",
        "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the "
        "image. The generated content should not introduce elements that conflict with or distort the original "
        "description.",
        f"Textual prompt - {PROMPT}",
        "",
        "",
        "Please provide the overall ratings of this image: <|Reward|>",
        "",
        "END",
        "",
    )
)
"""The text after the image. Its source is hpsv3/dataset/data_collator_qwen.py of MizzenAI/HPSv3 (pip hpsv3 1.0.0), but
it was written down from memory and not compared with that file; every word and line break moves the score."""


def instruction(prompt: str) -> str:
    """Return the text that follows the image."""
    return INSTRUCTION.replace(PROMPT, prompt)


class HpsV3(QwenScorer):
    """HPSv3.

    score = mu, the first output of the head at the state of the token <|Reward|>; component `sigma` is the second.
    The image has 256 * 28^2 pixels, resized by Pillow, bicubic. Published in bfloat16 and computed in float32, in which
    the model takes 31 GB.
    Source: MizzenAI/HPSv3 (hpsv3/model/qwen2vl_trainer.py, hpsv3/inference.py), by this project's notes on it.
    """

    name: ClassVar[str] = "hpsv3"
    description: ClassVar[str] = (
        "Which image would people prefer for this prompt? (HPSv3 on Qwen2-VL-7B; neither its instruction nor its "
        "values are verified against the official code)"
    )
    scale: ClassVar[str] = "mean of a preference, about 0 to 15"
    licence: ClassVar[str] = "MIT"
    parts: ClassVar[tuple[str, ...]] = ("hpsv3", "qwen2-vl-processor")

    def shaping(self, digests: Mapping[str, str]) -> JsonObject:
        """Return everything that shapes a score, for weights with these digests by part."""
        text = hashlib.sha256(INSTRUCTION.encode()).hexdigest()
        return {**super().shaping(digests), "preprocessing": f"qwen-{NUM_PIXELS}", "instruction": text}

    def _load(self, folders: dict[str, Path], device: Any) -> None:
        from pipelines.scores.scorers.trunks.hpsv3 import load_reward_model

        weights, processor = (folders[part] for part in self.parts)
        self._model = load_reward_model(weights, processor, device)

    def _scores(self, images: "list[Image]", prompts: list[str]) -> list[Score]:
        size = {"shortest_edge": NUM_PIXELS, "longest_edge": NUM_PIXELS}
        rewards = self._model.rewards(images, [instruction(prompt) for prompt in prompts], size=size)
        return [Score(mean, {"sigma": spread}) for mean, spread in rewards]
