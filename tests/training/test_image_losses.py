"""The losses of single images against mpmath at 60 digits, and against values worked out by hand."""

import inspect
import math
from collections.abc import Callable
from itertools import product

import mpmath  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor

from training.image_losses import (
    IMAGE_LOSSES,
    ImageErrors,
    dco_loss,
    dreambooth_loss,
    image_loss,
    kl_of,
    kto_loss,
)
from training.losses import pair_loss
from training.methods import METHODS, NEEDS_REFERENCE

mpmath.mp.dps = 60
LARGEST_RELATIVE_ERROR = 2e-7  # float32 itself rounds by 6e-8
UNDERFLOW = 1e-37
GRID = [10 ** (exponent / 2) for exponent in range(-24, 7)] + [0.0]  # 1e-12 .. 1e3
PLANE = [torch.tensor(column).tolist() for column in zip(*product(GRID, GRID), strict=True)]  # as float32
NEAR = [[0.1 + gain for gain in (-1e-3, -1e-5, 0.0, 1e-6, 1e-4, 2e-3)], [0.1] * 6]  # where training is
LN2 = math.log(2)


def assert_exact(
    loss: Callable[[Tensor, Tensor], Tensor],
    exact: Callable[[mpmath.mpf, mpmath.mpf], tuple[mpmath.mpf, mpmath.mpf]],
    columns: list[list[float]],
) -> None:
    """Compare value and gradient by the error, for each image."""
    error, reference = (torch.tensor(column, requires_grad=True) for column in columns)
    values = loss(error, reference.detach())
    values.sum().backward()
    assert values.dtype == torch.float32
    assert error.grad is not None
    points = zip(error.tolist(), reference.tolist(), values.tolist(), error.grad.tolist(), strict=True)
    for m, ref, value, slope in points:
        for name, got, wanted in zip(("value", "slope"), (value, slope), exact(m, ref), strict=True):
            allowed = LARGEST_RELATIVE_ERROR * float(abs(wanted)) + UNDERFLOW
            assert float(abs(got - wanted)) <= allowed, f"{name} at {m}, {ref}: {got!r}, exactly {float(wanted)!r}"


@pytest.mark.parametrize("is_good", [True, False])
@pytest.mark.parametrize(("beta", "kl", "weight"), [(1000, 0.0, 1.0), (1000, 3e-4, 0.3), (1, 0.25, 2.0)])
@pytest.mark.parametrize("columns", [PLANE, NEAR], ids=["plane", "near"])
def test_kto_is_exact(columns: list[list[float]], beta: float, kl: float, weight: float, *, is_good: bool) -> None:
    weights = {"desirable": weight if is_good else 7.0, "undesirable": 7.0 if is_good else weight}

    def computed(error: Tensor, reference: Tensor) -> Tensor:
        return kto_loss(error, reference, torch.full(error.shape, is_good), kl, beta=beta, **weights)

    def exact(m: float, ref: float) -> tuple[mpmath.mpf, mpmath.mpf]:
        side = 1 if is_good else -1
        x = side * mpmath.mpf(beta) * ((mpmath.mpf(ref) - mpmath.mpf(m)) - mpmath.mpf(kl))
        h = 1 / (1 + mpmath.exp(-x))
        fall = 1 / (1 + mpmath.exp(x))  # 1 - h, without its cancellation
        return weight * fall, weight * h * fall * side * beta

    assert_exact(computed, exact, columns)


@pytest.mark.parametrize("beta", [1000, 1])
@pytest.mark.parametrize("columns", [PLANE, NEAR], ids=["plane", "near"])
def test_dco_is_exact(columns: list[list[float]], beta: float) -> None:
    def exact(m: float, ref: float) -> tuple[mpmath.mpf, mpmath.mpf]:
        x = mpmath.mpf(beta) * (mpmath.mpf(ref) - mpmath.mpf(m))
        return mpmath.log1p(mpmath.exp(-x)), beta / (1 + mpmath.exp(x))

    assert_exact(lambda error, reference: dco_loss(error, reference, beta=beta), exact, columns)


def test_dreambooth_is_the_error_times_its_weight() -> None:
    errors = torch.tensor([0.25, 3e-9, 1000.0, 0.25], requires_grad=True)
    is_prior = torch.tensor([False, False, True, True])
    values = dreambooth_loss(errors, is_prior, prior_weight=0.5)
    assert values.tolist() == torch.tensor([0.25, 3e-9, 500.0, 0.125]).tolist()
    assert torch.autograd.grad(values.sum(), errors)[0].tolist() == [1, 1, 0.5, 0.5]
    assert dreambooth_loss(errors, is_prior, prior_weight=0.0).tolist()[2:] == [0, 0]


def test_a_model_that_equals_its_reference_has_the_values_of_the_first_step() -> None:
    same, is_good = torch.tensor([0.1, 0.1]), torch.tensor([True, False])
    values = kto_loss(same, same, is_good, 0.0, beta=1000, desirable=1, undesirable=3)
    assert values.tolist() == [0.5, 1.5]
    assert dco_loss(same, same, beta=1000).tolist() == pytest.approx([LN2, LN2])


def test_the_reference_point_is_never_negative() -> None:
    assert kl_of(-2.0, 4) == 0
    assert kl_of(3.0, 4) == 0.75
    assert kl_of(0.0, 0) == 0


def test_the_registry_and_the_losses_agree() -> None:
    assert IMAGE_LOSSES.keys() == {name for name, method in METHODS.items() if method.is_of_images}
    for name, method in METHODS.items():
        if name not in IMAGE_LOSSES:
            assert method.kinds == ("pair",)
            continue
        wanted = ("prior" in method.kinds, "judged" in method.kinds)
        assert wanted == (name == "dreambooth", True)
        error = torch.tensor([0.1, 0.3], requires_grad=True)
        reference = torch.tensor([0.1001, 0.2999], requires_grad=True) if name in NEEDS_REFERENCE else None
        loss = image_loss(name, {})(ImageErrors(error, reference), torch.tensor([True, False]), False, 0.0)
        loss.sum().backward()
        assert error.grad is not None
        assert bool(error.grad.all())
        assert (error.grad[1] < 0) == (name == "kto"), "a bad image pushes away in kto alone"


def test_parameters_have_the_names_of_the_registry() -> None:
    for name, function in (("kto", kto_loss), ("dreambooth", dreambooth_loss), ("dco", dco_loss)):
        named = [
            each.name for each in inspect.signature(function).parameters.values() if each.kind is each.KEYWORD_ONLY
        ]
        assert named == list(METHODS[name].parameters)


@pytest.mark.parametrize("method", ["kto", "dco"])
def test_a_missing_reference_is_named(method: str) -> None:
    with pytest.raises(ValueError, match=f"{method} compares with a frozen reference"):
        image_loss(method, {})(ImageErrors(torch.ones(1)), torch.ones(1, dtype=torch.bool), False, 0.0)


def test_a_loss_of_images_is_no_loss_of_pairs() -> None:
    with pytest.raises(ValueError, match="kto is a loss of images"):
        pair_loss("kto", {}, num_train_timesteps=1000)


@pytest.mark.parametrize(
    ("error", "reference", "message"),
    [
        (torch.ones(3), torch.ones(2), "error 3, reference 2"),
        (torch.ones(2).double(), None, "error is torch.float64"),
        (torch.ones(2, 1), None, r"shape \(2, 1\)"),
    ],
)
def test_errors_are_one_float32_an_image(error: Tensor, reference: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageErrors(error, reference)
