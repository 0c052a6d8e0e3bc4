"""The losses against mpmath at 60 digits, and against values worked out by hand."""

import inspect
import math
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import mpmath  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines.dataset.errors import ConfigError
from training.image_losses import IMAGE_LOSSES
from training.losses import (
    LOSSES,
    PairErrors,
    dpo_loss,
    ipo_loss,
    log_phi,
    mapo_loss,
    mapo_paper_linear_loss,
    mapo_paper_loss,
    orpo_loss,
    pair_loss,
    sft_loss,
    simpo_loss,
)
from training.methods import METHODS, NEEDS_REFERENCE, check_parameters

mpmath.mp.dps = 60
Loss = Callable[..., Tensor]  # of one column an image: chosen, rejected, then those of the reference
Exact = Callable[..., list[mpmath.mpf]]  # of one number an image: value, gradient by chosen, gradient by rejected
LARGEST_RELATIVE_ERROR = 2e-7  # float32 itself rounds by 6e-8
UNDERFLOW = 1e-37  # below it float32 has fewer digits

GRID = [10 ** (exponent / 2) for exponent in range(-24, 7)] + [0.0]  # 1e-12 .. 1e3
PLANE = [list(column) for column in zip(*product(GRID, GRID), strict=True)]
ERRORS = st.floats(-12, 3).map(lambda exponent: 10**exponent) | st.just(0.0)
SHARES = st.floats(0.5, 1, width=32)


def mapo(beta: float = 0.1, snr: float = 0.5, num_train_timesteps: int = 1000) -> Loss:
    return lambda c, r: mapo_loss(c, r, beta=beta, snr=snr, num_train_timesteps=num_train_timesteps)


def paper(beta: float = 8.0) -> Loss:
    return lambda c, r: mapo_paper_loss(c, r, beta=beta)


def linear(beta: float = 8.0) -> Loss:
    return lambda c, r: mapo_paper_linear_loss(c, r, beta=beta)


def dpo(beta: float = 5000.0) -> Loss:
    return lambda c, r, ref_c, ref_r: dpo_loss(c, r, ref_c, ref_r, beta=beta)


def ipo(beta: float = 2500.0) -> Loss:
    return lambda c, r, ref_c, ref_r: ipo_loss(c, r, ref_c, ref_r, beta=beta)


def simpo(beta: float = 100.0, gamma: float = 1.0) -> Loss:
    return lambda c, r: simpo_loss(c, r, beta=beta, gamma=gamma)


def orpo(beta: float = 0.1) -> Loss:
    return lambda c, r: orpo_loss(c, r, beta=beta)


def with_references(loss: Loss, method: str) -> Loss:
    """The loss as a function of all four columns."""
    return loss if method in NEEDS_REFERENCE else lambda c, r, ref_c, ref_r: loss(c, r)


BY_HAND: dict[str, Loss] = {
    "mapo": mapo(0.1, 0.5, 1000),
    "mapo_paper": paper(8),
    "mapo_paper_linear": linear(8),
    "sft": lambda c, r: sft_loss(c),
    "dpo": dpo(5000),
    "ipo": ipo(2500),
    "simpo": simpo(100, 1),
    "orpo": orpo(0.1),
}
BY_HAND = {method: with_references(loss, method) for method, loss in BY_HAND.items()}


def value_and_gradients(loss: Loss, *columns: list[float]) -> list[list[float]]:
    c, r = (torch.tensor(column, requires_grad=True) for column in columns[:2])
    values = loss(c, r, *(torch.tensor(column) for column in columns[2:]))
    values.sum().backward()
    assert values.dtype == torch.float32
    assert values.shape == c.shape
    assert c.grad is not None
    gradients = c.grad, torch.zeros_like(r) if r.grad is None else r.grad
    return [values.tolist(), *(gradient.tolist() for gradient in gradients)]


def exact_phi(x: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf]:
    """phi and its derivative from the textbook formulas; 60 digits survive their cancellation."""
    if x == 0:
        return mpmath.mpf(1), mpmath.mpf(-1) / 2
    e = mpmath.exp(x)
    return x / (e - 1), -(x * e - e + 1) / (e - 1) ** 2


def exact_mapo(c: float, r: float, beta: float, snr: float, num_train_timesteps: int) -> list[mpmath.mpf]:
    """Value, gradient by chosen, gradient by rejected."""
    (phi_c, slope_c), (phi_r, slope_r) = exact_phi(mpmath.mpf(snr) * c), exact_phi(mpmath.mpf(snr) * r)
    margin = num_train_timesteps * (phi_c - phi_r)
    pull = mpmath.mpf(beta) / (1 + mpmath.exp(margin)) * num_train_timesteps * snr
    return [c + beta * mpmath.log1p(mpmath.exp(-margin)), 1 - pull * slope_c, pull * slope_r]


def exact_paper(c: float, r: float, beta: float) -> list[mpmath.mpf]:
    (phi_c, slope_c), (phi_r, slope_r) = exact_phi(mpmath.mpf(c)), exact_phi(mpmath.mpf(r))
    margin = phi_c**beta - phi_r**beta
    pull = 1 / (1 + mpmath.exp(margin))
    value = c + mpmath.log1p(mpmath.exp(-margin)) / beta
    return [value, 1 - pull * phi_c ** (beta - 1) * slope_c, pull * phi_r ** (beta - 1) * slope_r]


def exact_linear(c: float, r: float, beta: float) -> list[mpmath.mpf]:
    (phi_c, slope_c), (phi_r, slope_r) = exact_phi(mpmath.mpf(c)), exact_phi(mpmath.mpf(r))
    margin = beta * (phi_c - phi_r)
    pull = 1 / (1 + mpmath.exp(margin))
    return [c + mpmath.log1p(mpmath.exp(-margin)) / beta, 1 - pull * slope_c, pull * slope_r]


def exact_margin(z: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf]:
    """-log sigmoid(z) and its derivative."""
    return mpmath.log1p(mpmath.exp(-z)), -1 / (1 + mpmath.exp(z))


def exact_dpo(c: float, r: float, ref_c: float, ref_r: float, *, beta: float) -> list[mpmath.mpf]:
    c, r, ref_c, ref_r, beta = map(mpmath.mpf, (c, r, ref_c, ref_r, beta))
    value, slope = exact_margin(-beta / 2 * ((c - r) - (ref_c - ref_r)))
    return [value, -slope * beta / 2, slope * beta / 2]


def exact_ipo(c: float, r: float, ref_c: float, ref_r: float, *, beta: float) -> list[mpmath.mpf]:
    c, r, ref_c, ref_r, beta = map(mpmath.mpf, (c, r, ref_c, ref_r, beta))
    off = ((ref_c - ref_r) - (c - r)) - 1 / (2 * beta)
    return [off**2, -2 * off, 2 * off]


def exact_simpo(c: float, r: float, beta: float, gamma: float) -> list[mpmath.mpf]:
    value, slope = exact_margin(mpmath.mpf(beta) * (mpmath.mpf(r) - c) - gamma)
    return [value, -slope * beta, slope * beta]


def exact_orpo(c: float, r: float, beta: float) -> list[mpmath.mpf]:
    value, slope = exact_margin(mpmath.mpf(r) - c)
    return [c + mpmath.mpf(beta) * value, 1 - slope * beta, slope * beta]


EXACT: dict[str, Exact] = {
    "mapo": lambda c, r, ref_c, ref_r: exact_mapo(c, r, 0.1, 0.5, 1000),
    "mapo_paper": lambda c, r, ref_c, ref_r: exact_paper(c, r, 8),
    "mapo_paper_linear": lambda c, r, ref_c, ref_r: exact_linear(c, r, 8),
    "sft": lambda c, r, ref_c, ref_r: [mpmath.mpf(c), mpmath.mpf(1), mpmath.mpf(0)],
    "dpo": lambda c, r, ref_c, ref_r: exact_dpo(c, r, ref_c, ref_r, beta=5000),
    "ipo": lambda c, r, ref_c, ref_r: exact_ipo(c, r, ref_c, ref_r, beta=2500),
    "simpo": lambda c, r, ref_c, ref_r: exact_simpo(c, r, 100, 1),
    "orpo": lambda c, r, ref_c, ref_r: exact_orpo(c, r, 0.1),
}


def exact_weighed(method: str, point: tuple[float, ...], share: float) -> tuple[list[mpmath.mpf], list[mpmath.mpf]]:
    """Value and gradients of both orders weighed by `share`, and the size of what is added up in each."""
    c, r, ref_c, ref_r = point
    value, by_c, by_r = EXACT[method](c, r, ref_c, ref_r)
    other, other_by_r, other_by_c = EXACT[method](r, c, ref_r, ref_c)
    orders = [(value, other), (by_c, other_by_c), (by_r, other_by_r)]
    share = mpmath.mpf(share)
    total = [share * first + (1 - share) * second for first, second in orders]
    return total, [share * abs(first) + (1 - share) * abs(second) for first, second in orders]


def as_float32(column: list[float]) -> list[float]:
    return torch.tensor(column).tolist()


def assert_close(got: float, wanted: mpmath.mpf, size: mpmath.mpf, what: str) -> None:
    allowed = LARGEST_RELATIVE_ERROR * float(abs(size)) + UNDERFLOW
    assert float(abs(got - wanted)) <= allowed, f"{what}: {got!r}, exactly {float(wanted)!r}"


def assert_exact(loss: Loss, exact: Exact, *columns: list[float]) -> None:
    columns = tuple(as_float32(column) for column in columns)
    computed = value_and_gradients(loss, *columns)
    for index, point in enumerate(zip(*columns, strict=True)):
        for name, values, wanted in zip(("value", "d/dc", "d/dr"), computed, exact(*point), strict=True):
            assert_close(values[index], wanted, wanted, f"{name} at {point}")


def random_quadruples(count: int) -> list[list[float]]:
    """Four columns of errors over fifteen decades: half of them unrelated, half near their reference."""
    generator = torch.Generator().manual_seed(0)
    c, r, ref_c, ref_r = 10 ** (15 * torch.rand(4, count, generator=generator, dtype=torch.float64) - 12)
    is_near = torch.arange(count) % 2 == 0
    change = 10 ** (6 * torch.rand(2, count, generator=generator, dtype=torch.float64) - 6)  # 1e-6 .. 1
    near_c, near_r = c * (1 + change[0]), r * (1 - change[1])
    columns = c, r, torch.where(is_near, near_c, ref_c), torch.where(is_near, near_r, ref_r)
    return [column.tolist() for column in columns]


@pytest.mark.parametrize(("beta", "snr", "timesteps"), [(0.1, 0.5, 1000), (2.0, 1.0, 50), (0.0, 0.5, 1000)])
def test_mapo_and_its_gradient_are_exact_over_fifteen_decades(beta: float, snr: float, timesteps: int) -> None:
    assert_exact(mapo(beta, snr, timesteps), lambda c, r: exact_mapo(c, r, beta, snr, timesteps), *PLANE)


@pytest.mark.parametrize("beta", [1.0, 8.0, 1024.0])
def test_the_papers_form_and_its_gradient_are_exact_over_fifteen_decades(beta: float) -> None:
    assert_exact(paper(beta), lambda c, r: exact_paper(c, r, beta), *PLANE)


@pytest.mark.parametrize("beta", [1.0, 8.0, 1024.0])
def test_the_papers_other_reading_and_its_gradient_are_exact_over_fifteen_decades(beta: float) -> None:
    assert_exact(linear(beta), lambda c, r: exact_linear(c, r, beta), *PLANE)


@pytest.mark.parametrize(("beta", "gamma"), [(100.0, 1.0), (1.0, 0.0), (5000.0, 3.0)])
def test_simpo_and_its_gradient_are_exact_over_fifteen_decades(beta: float, gamma: float) -> None:
    assert_exact(simpo(beta, gamma), lambda c, r: exact_simpo(c, r, beta, gamma), *PLANE)


@pytest.mark.parametrize("beta", [0.0, 0.1, 10.0])
def test_orpo_and_its_gradient_are_exact_over_fifteen_decades(beta: float) -> None:
    assert_exact(orpo(beta), lambda c, r: exact_orpo(c, r, beta), *PLANE)


@pytest.mark.parametrize("beta", [1.0, 2000.0, 5000.0])
def test_dpo_and_its_gradient_are_exact_over_fifteen_decades(beta: float) -> None:
    assert_exact(dpo(beta), lambda *point: exact_dpo(*point, beta=beta), *random_quadruples(1000))


@pytest.mark.parametrize("beta", [0.1, 50.0, 2500.0])
def test_ipo_and_its_gradient_are_exact_over_fifteen_decades(beta: float) -> None:
    assert_exact(ipo(beta), lambda *point: exact_ipo(*point, beta=beta), *random_quadruples(1000))


@settings(deadline=None)
@given(chosen=ERRORS, ratio=st.floats(-1e-5, 1e-5))
def test_nearly_equal_errors_lose_no_digits(chosen: float, ratio: float) -> None:
    rejected = chosen * (1 + ratio)
    assert_exact(mapo(), lambda c, r: exact_mapo(c, r, 0.1, 0.5, 1000), [chosen], [rejected])
    assert_exact(paper(), lambda c, r: exact_paper(c, r, 8), [chosen], [rejected])
    assert_exact(simpo(), lambda c, r: exact_simpo(c, r, 100, 1), [chosen], [rejected])
    assert_exact(orpo(), lambda c, r: exact_orpo(c, r, 0.1), [chosen], [rejected])


@settings(deadline=None)
@given(chosen=ERRORS, rejected=ERRORS, by_chosen=st.floats(-1e-5, 1e-5), by_rejected=st.floats(-1e-5, 1e-5))
def test_a_model_near_its_reference_loses_no_digits(
    chosen: float, rejected: float, by_chosen: float, by_rejected: float
) -> None:
    columns = [chosen * (1 + by_chosen)], [rejected * (1 + by_rejected)], [chosen], [rejected]
    assert_exact(dpo(), lambda *point: exact_dpo(*point, beta=5000), *columns)
    assert_exact(ipo(), lambda *point: exact_ipo(*point, beta=2500), *columns)


@settings(deadline=None)
@given(error=ERRORS, beta=st.floats(0.01, 1024))
def test_equal_errors_give_the_error_and_beta_ln_2(error: float, beta: float) -> None:
    error = torch.tensor(error).item()
    values, _, _ = value_and_gradients(mapo(beta), [error], [error])
    assert values == pytest.approx([error + beta * math.log(2)], rel=1e-7)
    for loss in (paper(beta), linear(beta)):
        values, _, _ = value_and_gradients(loss, [error], [error])
        assert values == pytest.approx([error + math.log(2) / beta], rel=1e-7)


@settings(deadline=None)
@given(error=ERRORS, beta=st.floats(0.01, 1024), gamma=st.floats(0, 5))
def test_equal_errors_give_orpo_beta_ln_2_and_simpo_what_gamma_asks_for(
    error: float, beta: float, gamma: float
) -> None:
    error = torch.tensor(error).item()
    values, _, _ = value_and_gradients(orpo(beta), [error], [error])
    assert values == pytest.approx([error + beta * math.log(2)], rel=1e-7)
    values, _, _ = value_and_gradients(simpo(beta, gamma), [error], [error])
    assert values == pytest.approx([math.log1p(math.exp(gamma))], rel=1e-7)


def test_simpo_with_the_lead_that_gamma_asks_for_is_ln_2() -> None:
    values, by_chosen, by_rejected = value_and_gradients(simpo(64, 1), [0.25], [0.25 + 1 / 64])
    assert values == pytest.approx([math.log(2)], rel=1e-7)
    assert (by_chosen, by_rejected) == ([32], [-32])


@settings(deadline=None)
@given(chosen=ERRORS, rejected=ERRORS, more=ERRORS)
def test_orpo_never_rewards_a_larger_error_of_the_chosen_image(chosen: float, rejected: float, more: float) -> None:
    values, by_chosen, by_rejected = value_and_gradients(orpo(), [chosen, chosen + more], [rejected, rejected])
    assert values[1] >= values[0]
    assert all(1 <= gradient <= 1.1 + 1e-6 for gradient in by_chosen)
    assert all(-0.1 - 1e-6 <= gradient <= 0 for gradient in by_rejected)


@pytest.mark.parametrize(
    ("loss", "by_chosen", "by_rejected"),
    [
        (mapo(), 13.292, -12.292),
        (paper(8), 1.170, -0.170),
        (paper(32), 1.051, -0.0506),
        (paper(1024), 1, 0),
        (linear(8), 1.242, -0.242),
        (linear(1024), 1.242, -0.242),
        (BY_HAND["sft"], 1, 0),
        (dpo(), 1250, -1250),
        (ipo(), 4e-4, -4e-4),
        (simpo(), 73.106, -73.106),
        (orpo(), 1.05, -0.05),
    ],
)
def test_gradients_at_one_tenth_are_those_in_the_docs(loss: Loss, by_chosen: float, by_rejected: float) -> None:
    tenths = [[0.1]] * len(inspect.signature(loss).parameters)
    _, chosen, rejected = value_and_gradients(loss, *tenths)
    assert chosen == pytest.approx([by_chosen], rel=1e-6, abs=6e-4 if abs(by_chosen) > 0.1 else 1e-9)
    assert rejected == pytest.approx([by_rejected], rel=1e-6, abs=6e-4 if abs(by_chosen) > 0.1 else 1e-9)


@settings(deadline=None)
@given(chosen=st.floats(1e-3, 20), rejected=st.floats(1e-3, 20))
def test_mapo_equals_the_released_code_where_that_is_accurate(chosen: float, rejected: float) -> None:
    c, r = torch.tensor([chosen]), torch.tensor([rejected])
    c64, r64 = c.double(), r.double()
    log_odds = 0.5 * c64 / (torch.exp(0.5 * c64) - 1) - 0.5 * r64 / (torch.exp(0.5 * r64) - 1)
    released = c64 - 0.1 * torch.nn.functional.logsigmoid(1000 * log_odds)
    assert mapo()(c, r).item() == pytest.approx(released.item(), rel=1e-6)


def test_mapo_equals_the_released_code_on_random_tensors_and_is_finite_where_that_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    c, r = (10 ** (8 * torch.rand(2, 20_000, generator=generator) - 5)).float()  # 1e-5 .. 1e3
    c[::10], r[::7], c[::31], r[::37] = 0.0, 1e-20, 3e3, 1e30
    c64, r64 = c.double(), r.double()
    log_odds = 0.5 * c64 / (torch.exp(0.5 * c64) - 1) - 0.5 * r64 / (torch.exp(0.5 * r64) - 1)
    released = c64 - 0.1 * torch.nn.functional.logsigmoid(1000 * log_odds)
    is_finite = released.isfinite()
    ours = mapo()(c, r)
    assert 10_000 < int(is_finite.sum()) < 19_000
    torch.testing.assert_close(ours[is_finite], released[is_finite].float(), rtol=1e-6, atol=0)
    assert ours.isfinite().all()


def test_no_error_from_zero_to_ten_thousand_gives_nan_or_infinity() -> None:
    errors = torch.cat([torch.zeros(1), torch.logspace(-45, 4, 4000), torch.linspace(0, 1e4, 4000)])
    reference = errors.roll(1000), errors.roll(3000)
    for loss, other in product((*BY_HAND.values(), paper(1024)), (errors.flip(0), errors, torch.zeros(8001))):
        c, r = errors.clone().requires_grad_(), other.clone().requires_grad_()
        value = loss(c, r, *reference[: len(inspect.signature(loss).parameters) - 2])
        first = torch.autograd.grad(value.sum(), (c, r), create_graph=True, materialize_grads=True)
        total = first[0].sum() + first[1].sum()
        second = torch.autograd.grad(total, (c, r), materialize_grads=True) if total.requires_grad else ()
        assert all(bool(tensor.isfinite().all()) for tensor in (value, *first, *second))


def test_phi_at_zero_is_one_with_slope_minus_a_half_and_curvature_a_sixth() -> None:
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    phi = log_phi(x).exp()
    (slope,) = torch.autograd.grad(phi, x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, x)
    assert (phi.item(), slope.item()) == (1, -0.5)
    assert curvature.item() == pytest.approx(1 / 6, rel=1e-15)


def test_series_and_closed_form_of_phi_meet_without_a_step() -> None:
    around = torch.tensor([0.1 - 1e-9, 0.1 + 1e-9], dtype=torch.float64, requires_grad=True)
    value = log_phi(around)
    (slope,) = torch.autograd.grad(value.sum(), around, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), around)
    for index, x in enumerate(around.tolist()):
        phi, by_x = exact_phi(mpmath.mpf(x))
        assert value[index].item() == pytest.approx(float(mpmath.log(phi)), rel=1e-13)
        assert slope[index].item() == pytest.approx(float(by_x / phi), rel=1e-13)
    assert curvature[0].item() == pytest.approx(curvature[1].item(), rel=1e-10)


def test_first_and_second_derivatives_of_phi_agree_with_finite_differences() -> None:
    x = torch.tensor([0, 1e-3, 0.0999, 0.1001, 1, 30, 200], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_phi, (x,))
    assert torch.autograd.gradgradcheck(log_phi, (x,))


def test_a_nan_error_is_not_hidden() -> None:
    nan, one = torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 1.0])
    for loss in (mapo(), paper(), simpo(), orpo()):
        assert loss(nan, one).isnan().tolist() == [True, False]
        assert loss(one, nan).isnan().tolist() == [True, False]
    for loss, column in product((dpo(), ipo()), range(4)):
        columns = [nan if index == column else one for index in range(4)]
        assert loss(*columns).isnan().tolist() == [True, False]


def test_autocast_changes_nothing() -> None:
    c, r = torch.tensor([0.1, 1e-6]), torch.tensor([0.1001, 2e-6])
    for loss in BY_HAND.values():
        expected = loss(c, r, r, c)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(c, r, r, c), expected)


def test_dpo_of_a_model_that_equals_its_reference_is_ln_2() -> None:
    c, r = torch.tensor([0.3, 1e-9]), torch.tensor([0.1, 7.0])
    assert dpo_loss(c, r, c, r, beta=5000).tolist() == pytest.approx([math.log(2)] * 2, rel=1e-7)


def test_dpo_pulls_by_half_beta_times_the_gain_over_the_reference() -> None:
    c, r = torch.tensor([0.1], requires_grad=True), torch.tensor([0.1], requires_grad=True)
    loss = dpo_loss(c, r, torch.tensor([0.1002]), torch.tensor([0.1]), beta=5000)
    gain = float(torch.tensor(0.1002)) - float(torch.tensor(0.1))
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2500 * gain)), rel=1e-6)
    pull = 2500 / (1 + math.exp(2500 * gain))
    assert c.grad is not None
    assert r.grad is not None
    assert [c.grad.item(), r.grad.item()] == pytest.approx([pull, -pull], rel=1e-6)


@settings(deadline=None)
@given(chosen=ERRORS, rejected=ERRORS, beta=st.floats(0.1, 1e4))
def test_ipo_of_a_model_that_equals_its_reference_is_its_target_squared(
    chosen: float, rejected: float, beta: float
) -> None:
    columns = [chosen], [rejected], [chosen], [rejected]
    values, by_chosen, by_rejected = value_and_gradients(ipo(beta), *columns)
    assert values == pytest.approx([1 / (4 * beta**2)], rel=1e-6)
    assert by_chosen == pytest.approx([1 / beta], rel=1e-6)
    assert by_rejected == pytest.approx([-1 / beta], rel=1e-6)


def test_ipo_rests_at_its_target_and_pulls_back_beyond() -> None:
    target = 1 / 4096  # of beta 2048; exact in float32
    gains = [0.0, target, 2 * target]
    values, by_chosen, _ = value_and_gradients(ipo(2048), [0.5 - g for g in gains], [0.5] * 3, [0.5] * 3, [0.5] * 3)
    assert values == [target**2, 0, target**2]
    assert by_chosen == [2 * target, 0, -2 * target]


def test_the_defaults_of_dpo_and_ipo_pull_to_the_reference_alike() -> None:
    """IPO's target is where DPO's logit is a half: the same 1 / (2 beta) of the IPO paper."""
    assert METHODS["dpo"].defaults["beta"] / 2 * (1 / (2 * METHODS["ipo"].defaults["beta"])) == 0.5


def test_sft_is_the_chosen_error_itself() -> None:
    errors = torch.tensor([0.25, 0.0, 3e-9], requires_grad=True)
    assert torch.equal(sft_loss(errors), errors)
    assert torch.autograd.grad(sft_loss(errors).sum(), errors)[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (torch.ones(3), torch.ones(1), r"mse_chosen 3, mse_rejected 1.*chunk\(2\)"),
        (torch.ones(2).double(), torch.ones(2), r"mse_chosen is torch.float64.*\.float\(\)"),
        (torch.ones(2), torch.ones(2).half(), r"mse_rejected is torch.float16"),
        (torch.ones(2, 4), torch.ones(2, 4), r"shape \(2, 4\).*dim=\(1, 2, 3\)"),
        (torch.tensor(0.1), torch.tensor(0.1), r"shape \(\), not one value per pair"),
    ],
)
def test_anything_but_one_float32_a_pair_is_refused(chosen: Tensor, rejected: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):  # unwrapped: the suite's shape checks would speak first
        inspect.unwrap(mapo_loss)(chosen, rejected, beta=0.1, snr=0.5, num_train_timesteps=1000)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(mapo_paper_loss)(chosen, rejected, beta=8)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(simpo_loss)(chosen, rejected, beta=100, gamma=1)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(orpo_loss)(chosen, rejected, beta=0.1)
    for loss in (dpo_loss, ipo_loss):
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(loss)(chosen, rejected, chosen, rejected, beta=5000)
    with pytest.raises(ValueError, match=message.replace("mse_", "")):
        PairErrors(chosen, rejected)


@pytest.mark.parametrize("loss", [paper(0.0), linear(0.0), ipo(0.0), ipo(-1.0), ipo(math.nan)])
def test_a_beta_that_is_divided_by_is_positive(loss: Loss) -> None:
    ones = [torch.ones(1)] * len(inspect.signature(loss).parameters)
    with pytest.raises(ValueError, match=r"divides by beta, which is (0|-1|nan)"):
        loss(*ones)


COLUMNS = ("chosen", "rejected", "ref_chosen", "ref_rejected")


def columns_of(errors: PairErrors) -> list[Tensor]:
    return [getattr(errors, name) for name in COLUMNS]


def make_errors(*columns: list[float]) -> PairErrors:
    return PairErrors(*(torch.tensor(column) for column in columns))


def test_swapped_errors_are_those_of_the_other_order() -> None:
    errors = make_errors([1.0], [2.0], [3.0], [4.0])
    assert [getattr(errors.swapped(), name).item() for name in COLUMNS] == [2, 1, 4, 3]
    assert make_errors([1.0], [2.0]).swapped().ref_chosen is None


def weighed(method: str, columns: list[list[float]], shares: list[float], **parameters: float) -> list[list[float]]:
    """Value and gradients of a method with soft labels."""
    loss = pair_loss(method, parameters, num_train_timesteps=1000)
    return value_and_gradients(lambda *c: loss(PairErrors(*c), torch.tensor(shares)), *columns)


@pytest.mark.parametrize("method", LOSSES)
def test_soft_labels_weigh_the_two_orders_in_value_and_gradient(method: str) -> None:
    columns = [as_float32(column) for column in random_quadruples(300)]
    shares = torch.linspace(0.5, 1, 300).tolist()
    computed = weighed(method, columns, shares)
    for index, (*point, share) in enumerate(zip(*columns, shares, strict=True)):
        totals, sizes = exact_weighed(method, tuple(point), share)
        for name, values, wanted, size in zip(("value", "d/dc", "d/dr"), computed, totals, sizes, strict=True):
            assert_close(values[index], wanted, size, f"{name} at {point} with {share}")


@pytest.mark.parametrize("method", LOSSES)
def test_a_label_of_one_is_exactly_the_loss(method: str) -> None:
    columns = random_quadruples(2000)
    assert weighed(method, columns, [1.0] * 2000) == value_and_gradients(BY_HAND[method], *columns)


@pytest.mark.parametrize(
    ("method", "rejected", "other_order"),
    [
        ("mapo", 3e38, 3e38),
        ("mapo_paper", 3e38, 3e38),
        ("sft", math.inf, math.inf),
        ("sft", math.nan, math.nan),
        ("dpo", 3e38, math.inf),
        ("simpo", 3e38, math.inf),
        ("orpo", 3.3e38, math.inf),
    ],
)
def test_a_label_of_one_is_exact_where_the_other_order_overflows(
    method: str, rejected: float, other_order: float
) -> None:
    columns = [0.1, 0.1], [rejected, 0.2], [0.1, 0.1], [0.2, 0.2]
    computed = weighed(method, [*columns], [1.0, 0.75])
    alone = value_and_gradients(BY_HAND[method], *columns)
    assert [column[0] for column in computed] == [column[0] for column in alone]
    assert all(math.isfinite(number) for column in computed for number in column)
    swapped = BY_HAND[method](*(torch.tensor(columns[index][:1]) for index in (1, 0, 3, 2)))
    assert swapped.item() == pytest.approx(other_order, nan_ok=True)


def test_an_infinite_loss_stays_infinite() -> None:
    columns = [3e38], [0.1], [0.1], [0.1]
    for method in ("dpo", "ipo", "simpo"):
        assert weighed(method, [*columns], [1.0])[0] == weighed(method, [*columns], [0.75])[0] == [math.inf]


def test_an_infinite_slope_of_the_other_order_does_not_reach_a_label_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "sft", lambda errors, timesteps: errors.chosen.sqrt())  # slope inf at 0
    assert weighed("sft", [[0.25], [0.0]], [1.0]) == [[0.5], [1.0], [0.0]]


@pytest.mark.parametrize("method", LOSSES)
def test_a_tie_has_no_order(method: str) -> None:
    c, r, ref_c, ref_r = random_quadruples(2000)
    values, by_c, by_r = weighed(method, [c, r, ref_c, ref_r], [0.5] * 2000)
    assert weighed(method, [r, c, ref_r, ref_c], [0.5] * 2000) == [values, by_r, by_c]


@pytest.mark.parametrize("method", LOSSES)
def test_a_tie_of_equal_errors_pulls_both_images_alike(method: str) -> None:
    _, by_chosen, by_rejected = weighed(method, [[0.1], [0.1], [0.1], [0.1]], [0.5])
    half = 0.0 if method in ("dpo", "ipo", "simpo") else 0.5  # those that fine-tune as well
    assert [*by_chosen, *by_rejected] == pytest.approx([half, half], abs=1e-6)


@settings(deadline=None)
@given(share=SHARES, gain=st.floats(-1e-3, 1e-3))
def test_a_soft_label_shortens_the_target_of_ipo(share: float, gain: float) -> None:
    columns = [as_float32([number]) for number in (0.1 - gain, 0.2, 0.1, 0.2)]
    gain, target = columns[2][0] - columns[0][0], 1 / 5000
    values, by_chosen, _ = weighed("ipo", columns, [share])
    rest = 4 * share * (1 - share) * target**2
    assert values == pytest.approx([(gain - (2 * share - 1) * target) ** 2 + rest], rel=1e-5, abs=1e-15)
    assert by_chosen == pytest.approx([-2 * (gain - (2 * share - 1) * target)], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.99])
def test_dpo_and_simpo_rest_where_the_margin_is_the_logit_of_the_label(share: float) -> None:
    logit = math.log(share / (1 - share))
    for method, scale, parameters in [("dpo", 2500, {"beta": 5000}), ("simpo", 2500, {"beta": 2500, "gamma": 0})]:
        leads = [(logit + off) / scale for off in (-0.1, 0, 0.1)]
        columns = [[0.1] * 3, [0.1 + lead for lead in leads], [0.1] * 3, [0.1] * 3]
        _, (before, at, beyond), _ = weighed(method, columns, [share] * 3, **parameters)
        assert before > 2 > -2 > beyond
        assert at == pytest.approx(0, abs=0.05)  # 2500 * an ulp of 0.1


@pytest.mark.parametrize(
    ("preference", "message"),
    [
        (torch.ones(2).double(), r"torch.float64 of shape \(2,\), not torch.float32 of shape \(2,\).*ones_like"),
        (torch.ones(2, dtype=torch.int64), "torch.int64"),
        (torch.ones(1), r"shape \(1,\), not torch.float32 of shape \(2,\)"),
        (torch.ones(2, 1), r"shape \(2, 1\)"),
        (torch.tensor(1.0), r"shape \(\)"),
        (torch.tensor([1.0, 0.25]), r"preference of pair 1 is 0.25, not in \[0.5, 1\].*`rejected`"),
        (torch.tensor([1.5, 1.0]), "pair 0 is 1.5"),
        (torch.tensor([0.5, math.nan]), "pair 1 is nan"),
    ],
)
def test_a_preference_is_one_float32_from_a_half_to_one_a_pair(preference: Tensor, message: str) -> None:
    errors = make_errors([0.1, 0.2], [0.3, 0.4])
    with pytest.raises(ValueError, match=message):
        pair_loss("mapo_paper", {}, num_train_timesteps=1000)(errors, preference)


@pytest.mark.parametrize("method", sorted(NEEDS_REFERENCE & LOSSES.keys()))
@pytest.mark.parametrize("absent", [{"ref_chosen"}, {"ref_rejected"}, {"ref_chosen", "ref_rejected"}])
def test_a_method_with_a_reference_refuses_to_go_without(method: str, absent: set[str]) -> None:
    columns: dict[str, Any] = vars(make_errors([0.1], [0.2], [0.1], [0.2]))
    errors = PairErrors(**{**columns, **dict.fromkeys(absent)})
    others = ", ".join(name for name in METHODS if name not in NEEDS_REFERENCE)
    message = f"{method} compares.* but {' and '.join(sorted(absent))} of the.* a reference: {others}"
    with pytest.raises(ValueError, match=message):
        pair_loss(method, {}, num_train_timesteps=1000)(errors, torch.ones(1))


def test_a_method_without_a_reference_ignores_one() -> None:
    errors, one = make_errors([0.1], [0.2], [0.3], [0.4]), torch.ones(1)
    for method in LOSSES.keys() - NEEDS_REFERENCE:
        loss = pair_loss(method, {}, num_train_timesteps=1000)
        assert torch.equal(loss(errors, one), loss(PairErrors(errors.chosen, errors.rejected), one))


def test_every_method_has_a_loss_and_its_defaults_are_the_documented_ones() -> None:
    errors = make_errors([0.1, 0.4], [0.2, 0.3], [0.1001, 0.4002], [0.2003, 0.2999])
    assert LOSSES.keys() == BY_HAND.keys() == METHODS.keys() - IMAGE_LOSSES.keys()
    for method, loss in BY_HAND.items():
        computed = pair_loss(method, {}, num_train_timesteps=1000)(errors, torch.ones(2))
        assert torch.equal(computed, loss(*columns_of(errors)))


def test_every_method_is_compared_with_the_others_in_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "concepts" / "losses.md").read_text()
    compared = text.partition("## Which one")[2].partition("## Losses of single images")[0]
    tables = [re.findall(r"^\| `(\w+)`", table, re.MULTILINE) for table in compared.split("The gradients at the start")]
    assert [sorted(table) for table in tables] == [sorted(METHODS)] * 2


@pytest.mark.parametrize("method", LOSSES)
def test_the_registry_says_of_a_method_what_its_loss_does(method: str) -> None:
    known = METHODS[method]
    assert list(inspect.signature(LOSSES[method]).parameters)[2:] == list(known.parameters)
    assert known.recipe is None or known.recipe in METHODS
    columns = [torch.tensor([number], requires_grad=True) for number in (0.1, 0.2, 0.1, 0.2)]
    pair_loss(method, {}, num_train_timesteps=1000)(PairErrors(*columns), torch.ones(1)).sum().backward()
    of_rejected, of_reference = columns[1].grad, columns[2].grad
    assert (of_rejected is not None and bool(of_rejected)) == known.learns_preference
    assert (of_reference is not None) == known.needs_reference
    for name, parameter in known.parameters.items():
        if parameter.is_positive:
            with pytest.raises(ConfigError, match=f"{name} of {method} is 0; it must be a finite number > 0"):
                check_parameters(method, {name: 0})
        else:
            assert check_parameters(method, {name: 0})[name] == 0


def test_given_parameters_replace_defaults_one_by_one() -> None:
    assert check_parameters("mapo", {"snr": 1}) == {"beta": 0.1, "snr": 1.0}
    assert check_parameters("simpo", {"gamma": 0}) == {"beta": 100.0, "gamma": 0.0}
    errors = make_errors([0.1], [0.2], [0.1001], [0.2002])
    runs: list[tuple[str, dict[str, float], Loss]] = [
        ("mapo", {"beta": 0.3}, mapo(0.3, 0.5, 77)),
        ("mapo_paper", {"beta": 64}, paper(64)),
        ("mapo_paper_linear", {"beta": 64}, linear(64)),
        ("dpo", {"beta": 2000}, dpo(2000)),
        ("ipo", {"beta": 50}, ipo(50)),
        ("simpo", {"gamma": 0.5}, simpo(100, 0.5)),
        ("orpo", {"beta": 1}, orpo(1)),
    ]
    for method, parameters, loss in runs:
        computed = pair_loss(method, parameters, num_train_timesteps=77)(errors, torch.ones(1))
        columns = columns_of(errors)[: len(inspect.signature(loss).parameters)]
        assert torch.equal(computed, loss(*columns)), method


@pytest.mark.parametrize(
    ("method", "parameters", "message", "hint"),
    [
        ("mapo-paper", {}, f"'mapo-paper', which is not one of: {', '.join(METHODS)}", "`mapo_paper`"),
        ("xyz", {}, "'xyz'", " or ".join(f"`{method}`" for method in METHODS)),
        ("mapo", {"bta": 1}, r"bta is not a parameter.*beta \(default 0.1\), snr \(default 0.5\)", "`beta`"),
        ("mapo_paper", {"snr": 1}, "snr is not a parameter of method mapo_paper", "`beta`"),
        ("sft", {"beta": 1}, "sft has no parameters", "remove `loss:`"),
        ("mapo", {"beta": -1}, "beta of mapo is -1; it must be a finite number >= 0", "default, 0.1"),
        ("mapo", {"snr": math.nan}, "snr of mapo is nan", "default, 0.5"),
        ("mapo_paper", {"beta": 0}, "beta of mapo_paper is 0; it must be a finite number > 0", "default, 8"),
        ("ipo", {"beta": 0}, "beta of ipo is 0; it must be a finite number > 0", "default, 2500"),
        ("dpo", {"beta": 0}, "beta of dpo is 0; it must be a finite number > 0", "default, 5000"),
        ("simpo", {"beta": 0.0}, "beta of simpo is 0.0; it must be a finite number > 0", "default, 100"),
        ("simpo", {"gamma": -1}, "gamma of simpo is -1; it must be a finite number >= 0", "default, 1"),
        ("orpo", {"lambda": 1}, r"lambda is not a parameter of method orpo, which has: beta \(default 0.1\)", "`beta`"),
        ("mapo_paper", {"beta": True}, "is True", "default, 8"),
        ("mapo_paper", {"beta": "8"}, "is '8'", "default, 8"),
    ],
)
def test_a_wrong_method_or_parameter_is_named_with_the_way_out(
    method: str, parameters: dict[str, float], message: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        check_parameters(method, parameters)
    assert hint in (refused.value.hint or "")


def test_the_loss_of_a_run_is_checked_by_the_same_rules() -> None:
    with pytest.raises(ConfigError, match="'gspo', which is not one of: mapo, mapo_paper, mapo_paper_linear, sft"):
        pair_loss("gspo", {}, num_train_timesteps=1000)
    with pytest.raises(ConfigError, match="snr is not a parameter of method mapo_paper"):
        pair_loss("mapo_paper", {"snr": 0.5}, num_train_timesteps=1000)
