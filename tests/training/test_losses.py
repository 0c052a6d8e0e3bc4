"""The losses against mpmath at 60 digits, and against values worked out by hand."""

import inspect
import math
from collections.abc import Callable
from itertools import product

import mpmath  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipelines.dataset.errors import ConfigError
from training.losses import LOSSES, dpo_loss, log_phi, mapo_loss, mapo_paper_loss, pair_loss, sft_loss
from training.methods import METHODS, check_parameters

mpmath.mp.dps = 60
Loss = Callable[[Tensor, Tensor], Tensor]
LARGEST_RELATIVE_ERROR = 2e-7  # float32 itself rounds by 6e-8
UNDERFLOW = 1e-37  # below it float32 has fewer digits

GRID = [10 ** (exponent / 2) for exponent in range(-24, 7)] + [0.0]  # 1e-12 .. 1e3
ERRORS = st.floats(-12, 3).map(lambda exponent: 10**exponent) | st.just(0.0)


def mapo(beta: float = 0.1, snr: float = 0.5, num_train_timesteps: int = 1000) -> Loss:
    return lambda c, r: mapo_loss(c, r, beta=beta, snr=snr, num_train_timesteps=num_train_timesteps)


def paper(beta: float = 8.0) -> Loss:
    return lambda c, r: mapo_paper_loss(c, r, beta=beta)


def value_and_gradients(loss: Loss, chosen: list[float], rejected: list[float]) -> list[list[float]]:
    c = torch.tensor(chosen, requires_grad=True)
    r = torch.tensor(rejected, requires_grad=True)
    values = loss(c, r)
    values.sum().backward()
    assert values.dtype == torch.float32
    assert values.shape == c.shape
    assert c.grad is not None
    assert r.grad is not None
    return [values.tolist(), c.grad.tolist(), r.grad.tolist()]


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


def assert_exact(
    loss: Loss, exact: Callable[[float, float], list[mpmath.mpf]], chosen: list[float], rejected: list[float]
) -> None:
    chosen, rejected = torch.tensor(chosen).tolist(), torch.tensor(rejected).tolist()  # as float32
    computed = value_and_gradients(loss, chosen, rejected)
    for index, (c, r) in enumerate(zip(chosen, rejected, strict=True)):
        for name, values, wanted in zip(("value", "d/dc", "d/dr"), computed, exact(c, r), strict=True):
            got = values[index]
            off = float(abs(got - wanted))
            allowed = LARGEST_RELATIVE_ERROR * float(abs(wanted)) + UNDERFLOW
            assert off <= allowed, f"{name} at c={c!r}, r={r!r}: {got!r}, exactly {float(wanted)!r}"


@pytest.mark.parametrize(("beta", "snr", "timesteps"), [(0.1, 0.5, 1000), (2.0, 1.0, 50), (0.0, 0.5, 1000)])
def test_mapo_and_its_gradient_are_exact_over_fifteen_decades(beta: float, snr: float, timesteps: int) -> None:
    chosen, rejected = (list(column) for column in zip(*product(GRID, GRID), strict=True))
    assert_exact(mapo(beta, snr, timesteps), lambda c, r: exact_mapo(c, r, beta, snr, timesteps), chosen, rejected)


@pytest.mark.parametrize("beta", [1.0, 8.0, 1024.0])
def test_the_papers_form_and_its_gradient_are_exact_over_fifteen_decades(beta: float) -> None:
    chosen, rejected = (list(column) for column in zip(*product(GRID, GRID), strict=True))
    assert_exact(paper(beta), lambda c, r: exact_paper(c, r, beta), chosen, rejected)


@given(chosen=ERRORS, ratio=st.floats(-1e-5, 1e-5))
def test_nearly_equal_errors_lose_no_digits(chosen: float, ratio: float) -> None:
    rejected = chosen * (1 + ratio)
    assert_exact(mapo(), lambda c, r: exact_mapo(c, r, 0.1, 0.5, 1000), [chosen], [rejected])
    assert_exact(paper(), lambda c, r: exact_paper(c, r, 8), [chosen], [rejected])


@given(error=ERRORS, beta=st.floats(0.01, 1024))
def test_equal_errors_give_the_error_and_beta_ln_2(error: float, beta: float) -> None:
    error = torch.tensor(error).item()
    values, _, _ = value_and_gradients(mapo(beta), [error], [error])
    assert values == pytest.approx([error + beta * math.log(2)], rel=1e-7)
    values, _, _ = value_and_gradients(paper(beta), [error], [error])
    assert values == pytest.approx([error + math.log(2) / beta], rel=1e-7)


@pytest.mark.parametrize(
    ("loss", "by_chosen", "by_rejected"),
    [(mapo(), 13.292, -12.292), (paper(8), 1.170, -0.170), (paper(32), 1.051, -0.0506), (paper(1024), 1, 0)],
)
def test_gradients_at_one_tenth_are_those_of_code_and_paper(loss: Loss, by_chosen: float, by_rejected: float) -> None:
    _, chosen, rejected = value_and_gradients(loss, [0.1], [0.1])
    assert chosen == pytest.approx([by_chosen], abs=6e-4)
    assert rejected == pytest.approx([by_rejected], abs=6e-4)


@given(chosen=st.floats(1e-3, 20), rejected=st.floats(1e-3, 20))
def test_mapo_equals_the_released_code_where_that_is_accurate(chosen: float, rejected: float) -> None:
    c, r = torch.tensor([chosen]), torch.tensor([rejected])
    c64, r64 = c.double(), r.double()
    log_odds = 0.5 * c64 / (torch.exp(0.5 * c64) - 1) - 0.5 * r64 / (torch.exp(0.5 * r64) - 1)
    released = c64 - 0.1 * torch.nn.functional.logsigmoid(1000 * log_odds)
    assert mapo()(c, r).item() == pytest.approx(released.item(), rel=1e-6)


def test_no_error_from_zero_to_ten_thousand_gives_nan_or_infinity() -> None:
    errors = torch.cat([torch.zeros(1), torch.logspace(-45, 4, 4000), torch.linspace(0, 1e4, 4000)])
    for loss, other in product((mapo(), paper(8), paper(1024)), (errors.flip(0), errors, torch.zeros(8001))):
        c, r = errors.clone().requires_grad_(), other.clone().requires_grad_()
        value = loss(c, r)
        first = torch.autograd.grad(value.sum(), (c, r), create_graph=True)
        second = torch.autograd.grad(first[0].sum() + first[1].sum(), (c, r))
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
    for loss in (mapo(), paper()):
        assert loss(nan, one).isnan().tolist() == [True, False]
        assert loss(one, nan).isnan().tolist() == [True, False]


def test_autocast_changes_nothing() -> None:
    c, r = torch.tensor([0.1, 1e-6]), torch.tensor([0.1001, 2e-6])
    for loss in (mapo(), paper()):
        expected = loss(c, r)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(c, r), expected)


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
        (torch.tensor(0.1), torch.tensor(0.1), r"shape \(\), not one value a pair"),
    ],
)
def test_anything_but_one_float32_a_pair_is_refused(chosen: Tensor, rejected: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):  # unwrapped: the suite's shape checks would speak first
        inspect.unwrap(mapo_loss)(chosen, rejected, beta=0.1, snr=0.5, num_train_timesteps=1000)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(mapo_paper_loss)(chosen, rejected, beta=8)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(dpo_loss)(chosen, rejected, chosen, rejected, beta=5000)


def test_the_papers_form_refuses_to_divide_by_zero() -> None:
    with pytest.raises(ValueError, match="beta, which is 0"):
        paper(0.0)(torch.ones(1), torch.ones(1))


def test_every_method_has_a_loss_and_its_defaults_are_the_published_ones() -> None:
    c, r = torch.tensor([0.1, 0.4]), torch.tensor([0.2, 0.3])
    by_hand = {"mapo": mapo(0.1, 0.5, 1000), "mapo_paper": paper(8), "sft": lambda c, r: c}
    assert LOSSES.keys() == METHODS.keys() == by_hand.keys()
    for method, loss in by_hand.items():
        assert torch.equal(pair_loss(method, {}, num_train_timesteps=1000)(c, r), loss(c, r))


def test_given_parameters_replace_defaults_one_by_one() -> None:
    assert check_parameters("mapo", {"snr": 1}) == {"beta": 0.1, "snr": 1.0}
    c, r = torch.tensor([0.1]), torch.tensor([0.2])
    chosen = pair_loss("mapo", {"beta": 0.3}, num_train_timesteps=77)
    assert torch.equal(chosen(c, r), mapo(0.3, 0.5, 77)(c, r))
    assert torch.equal(pair_loss("mapo_paper", {"beta": 64}, num_train_timesteps=77)(c, r), paper(64)(c, r))


@pytest.mark.parametrize(
    ("method", "parameters", "message", "hint"),
    [
        ("mapo-paper", {}, "'mapo-paper', which is not one of: mapo, mapo_paper, sft", "`mapo_paper`"),
        ("xyz", {}, "'xyz'", "`mapo` or `mapo_paper` or `sft`"),
        ("mapo", {"bta": 1}, r"bta is not a parameter.*beta \(default 0.1\), snr \(default 0.5\)", "`beta`"),
        ("mapo_paper", {"snr": 1}, "snr is not a parameter of method mapo_paper", "`beta`"),
        ("sft", {"beta": 1}, "sft has no parameters", "remove `loss:`"),
        ("mapo", {"beta": -1}, "beta of mapo is -1; it must be a finite number >= 0", "default, 0.1"),
        ("mapo", {"snr": math.nan}, "snr of mapo is nan", "default, 0.5"),
        ("mapo_paper", {"beta": 0}, "beta of mapo_paper is 0; it must be a finite number > 0", "default, 8"),
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
    with pytest.raises(ConfigError, match="'dpo', which is not one of: mapo, mapo_paper, sft"):
        pair_loss("dpo", {}, num_train_timesteps=1000)
    with pytest.raises(ConfigError, match="snr is not a parameter of method mapo_paper"):
        pair_loss("mapo_paper", {"snr": 0.5}, num_train_timesteps=1000)
