"""Prompts as token ids of CLIP and BERT, with the share of a prompt that its model does not see."""

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.dataset.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

CLIP_LENGTH = 77
"""Number of tokens that CLIP sees, with both marks."""
BLIP_LENGTH = 35
"""Number of tokens that ImageReward sees, with both marks."""
CUT = "cut_token_ratio"
"""Component of a score: the share of the prompt's tokens that the model did not see."""


def clean_as_open_clip(prompt: str) -> str:
    """Return a prompt as open_clip's tokenizer cleans it: mojibake and quotes mended, entities resolved, lower case.

    Raises:
        ModelError: ftfy is not installed, and the prompt is not plain enough to do without.
    """
    try:
        import ftfy
    except ImportError:
        if not _is_plain(prompt):
            raise ModelError(
                f"HPS cleans prompts with ftfy, which is not installed; needed for {prompt[:60]!r}",
                "pip install 'mapo[eval]'",
            ) from None
    else:
        prompt = ftfy.fix_text(prompt)
    return " ".join(html.unescape(html.unescape(prompt)).split()).lower()


def _is_plain(prompt: str) -> bool:
    """Return whether ftfy leaves a prompt as it is: printable ASCII and white space, no entities."""
    return prompt.isascii() and "&" not in prompt and all(each.isprintable() or each in "\t\n\r" for each in prompt)


class ClipTokens:
    """Tokenizer of CLIP: always 77 ids, padded with 0, and the end mark last where a prompt is too long.

    CLIP's text tower is causal and reads out the end mark, so that the padding changes nothing.

    Args:
        folder: The folder with `vocab.json` and `merges.txt`.
        clean: Cleans a prompt first.

    Raises:
        ModelError: The folder has no tokenizer.
    """

    def __init__(self, folder: Path, clean: Callable[[str], str] | None = None) -> None:
        from transformers import CLIPTokenizer

        self._tokenizer = _load(CLIPTokenizer, folder)
        self._clean = clean
        self._end = self._tokenizer.eos_token_id

    def __call__(self, prompts: Sequence[str]) -> "tuple[Tensor, list[float]]":
        """Return the ids, B, S; and the share of each prompt's own tokens that did not fit."""
        cleaned = [prompt if self._clean is None else self._clean(prompt) for prompt in prompts]
        ids = self._tokenizer(cleaned, truncation=False, verbose=False).input_ids
        return _table(ids, CLIP_LENGTH, self._end, padding=0), [_cut_ratio(each, CLIP_LENGTH) for each in ids]


class BertTokens:
    """Tokenizer of BERT for ImageReward: 35 ids, padded with 0; the first stays [CLS].

    Args:
        folder: The folder with `vocab.txt`.

    Raises:
        ModelError: The folder has no tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import BertTokenizer

        self._tokenizer = _load(BertTokenizer, folder)
        self._end = self._tokenizer.sep_token_id

    def __call__(self, prompts: Sequence[str]) -> "tuple[Tensor, Tensor, list[float]]":
        """Return the ids and the mask of tokens, B, S; and the share of each prompt's own tokens that did not fit."""
        ids = self._tokenizer(list(prompts), truncation=False, verbose=False).input_ids
        ids_BS = _table(ids, BLIP_LENGTH, self._end, padding=self._tokenizer.pad_token_id)
        mask_BS = _table([[1] * len(each) for each in ids], BLIP_LENGTH, 1, padding=0)
        return ids_BS, mask_BS, [_cut_ratio(each, BLIP_LENGTH) for each in ids]


def _load(tokenizer_class: Any, folder: Path) -> Any:
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()
    try:
        return tokenizer_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers have no common tree
        text = str(error).strip() or type(error).__name__
        raise ModelError(
            f"cannot load the tokenizer of {folder}: {text.splitlines()[0]}",
            "fetch it again: `mapo scorers fetch NAME`",
        ) from error


def _table(rows: Sequence[Sequence[int]], length: int, end: int, *, padding: int) -> "Tensor":
    import torch

    cut = [row if len(row) <= length else [*row[: length - 1], end] for row in rows]
    return torch.tensor([[*row, *[padding] * (length - len(row))] for row in cut], dtype=torch.long)


def _cut_ratio(ids: Sequence[int], length: int) -> float:
    """Return the share of a prompt's own tokens, both marks aside, that do not fit."""
    return max(0, len(ids) - length) / max(1, len(ids) - 2)
