"""The check that every loss makes of its inputs: one float32 error for each pair or image."""

import torch
from torch import Tensor

Number = float | int  # the tests' run-time checks (beartype) do not take 8 for a float


def check_errors(**errors: Tensor) -> None:
    """Check for one float32 value a pair, as many of each: broadcasting would average over pairs that do not exist."""
    for name, error in errors.items():
        if error.dtype != torch.float32:
            raise ValueError(
                f"{name} is {error.dtype}, not torch.float32. Compute the error in float32: "
                "`(prediction.float() - target.float()).pow(2).mean(dim=(1, 2, 3))`."
            )
        if error.ndim != 1:
            raise ValueError(
                f"{name} has shape {tuple(error.shape)}, not one value per pair. Take the mean over "
                "C, H, W only: `.mean(dim=(1, 2, 3))`."
            )
    shapes = {name: error.shape[0] for name, error in errors.items()}
    if len(set(shapes.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in shapes.items())
        raise ValueError(
            f"The number of pairs differs: {counts}. Pass the errors of both images of each pair; "
            "`chunk(2)` splits a batch of chosen then rejected images."
        )
