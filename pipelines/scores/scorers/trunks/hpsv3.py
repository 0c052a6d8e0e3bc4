"""HPSv3's model: Qwen2-VL with a head of three layers over the state of one token.

Letters: B images, D width of the model.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import read_config
from pipelines.dataset.safetensors_header import tensor_shapes
from pipelines.scores.parts import MODEL
from pipelines.scores.scorers.trunks.qwen_vl import QwenPrompts, QwenVl, check_part, read_tensors
from pipelines.scores.scorers.trunks.trunk import DAMAGED, frozen, load_pretrained

REWARD = "<|Reward|>"
HEAD = {"rm_head.0": "0", "rm_head.3": "2", "rm_head.5": "4"}
"""The layers of the head by their published names; a dropout lies after the first ReLU."""
EMBEDDINGS = "model.embed_tokens.weight"


class RewardHead(nn.Sequential):
    """The map D -> 1024 -> ReLU -> 16 -> ReLU -> 2, whose widths follow from the weights."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        weights = [state[f"{place}.weight"] for place in HEAD.values()]
        layers = [nn.Linear(weight.shape[1], weight.shape[0]) for weight in weights]
        super().__init__(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        self.load_state_dict(state)


class RewardModel(QwenVl):
    """The trunk, its prompts with the token that the reward is read from, and the head."""

    def __init__(self, model: nn.Module, head: RewardHead, prompts: QwenPrompts, device: torch.device) -> None:
        super().__init__(model, prompts, device)
        self.reward = prompts.token(REWARD)
        self.head = frozen(head, device)

    def rewards(self, images: list[Any], texts: list[str], **settings: Any) -> list[list[float]]:
        """Return for each image the outputs of the head at its reward token: mean and spread.

        Raises:
            ModelError: A text has no reward token, or several.
        """
        found: list[list[float]] = []
        for inputs, states_BSD in self.passes(images, texts, **settings):
            is_reward_BS = inputs["input_ids"] == self.reward
            counts = is_reward_BS.sum(dim=-1).tolist()
            if set(counts) != {1}:
                raise ModelError(
                    f"a text for HPSv3 has {next(each for each in counts if each != 1)} tokens {REWARD}, not one",
                    "is this the tokenizer of Qwen2-VL? fetch it again: mapo scorers fetch hpsv3",
                )
            found += self.head(states_BSD[is_reward_BS]).tolist()
        return found


def load_reward_model(folder: Path, processor: Path, device: Any) -> RewardModel:
    """Load HPSv3.

    Args:
        folder: The folder of its weights: those of `Qwen2VLForConditionalGeneration` before transformers 5, and the
            head's.
        processor: The folder of Qwen2-VL's tokenizer, image processor and configuration.
        device: A torch device.

    Raises:
        ModelError: Weights are missing, damaged or of another shape.
    """
    from transformers import Qwen2VLConfig, Qwen2VLModel

    check_part(folder, "hpsv3")
    shapes = tensor_shapes([folder / MODEL])
    names = {f"{old}.{kind}": f"{new}.{kind}" for old, new in HEAD.items() for kind in ("weight", "bias")}
    head = {names[old]: tensor for old, tensor in read_tensors(folder / MODEL, list(names)).items()}
    prompts = QwenPrompts(processor, marks=(REWARD,))
    num_rows = shapes.get(EMBEDDINGS, (0,))[0]
    if (reward := prompts.token(REWARD)) >= num_rows:
        raise ModelError(
            f"{folder / MODEL} has embeddings for {num_rows:,} tokens, and {REWARD} is number {reward:,}",
            "these are not the weights of HPSv3: fetch them again: mapo scorers fetch hpsv3",
        )
    config = Qwen2VLConfig(**read_config(processor / "config.json"))
    config.text_config.vocab_size = num_rows
    try:
        reward_head = RewardHead(head)
    except RuntimeError as error:
        raise ModelError(f"{folder / MODEL} has another head than HPSv3: {error}", DAMAGED) from error
    return RewardModel(load_pretrained(Qwen2VLModel, folder, config), reward_head, prompts, torch.device(device))
