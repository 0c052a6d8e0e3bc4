"""Adafactor under ZeRO: second moments by rows and columns of whole weights, although a rank has parts of them.

Adafactor of torch or transformers would take a flat partition for one long vector: it would factor nothing, and clip
all weights of a rank together (docs/decisions/0023-optimizers-over-ranks.md has the measurements).
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from training.optimizers.partition import Fragment, Partition, sum_over_ranks

EPS = 1e-30
DECAY = -0.8
CLIP = 1.0
ROWS, COLUMNS, ELEMENTS = "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"
Span = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """This rank's part of a parameter; one of two dimensions or more is a row of matrices over the last two.

    Args:
        index: The parameter's number among the trained ones.
        fragment: The part.
        offset: The first of its elements in the rank's flat partition.
        squares: Averages of squared gradients: ROWS (M, R) and COLUMNS (M, C) of the M matrices that the part reaches
            into, or ELEMENTS of a vector.
        shared: Those of the M that other ranks reach into too, each with the place of its sums in the common buffer.
    """

    index: int
    fragment: Fragment
    offset: int
    squares: dict[str, Tensor]
    shared: list[tuple[int, int]]

    @property
    def padding(self) -> Span:
        """Elements of the M matrices before the part and after it."""
        first, last = span_of(self.fragment)
        start, numel = self.fragment.start, matrix_numel(self.fragment)
        return start - first * numel, last * numel - start - self.fragment.numel

    def cut(self, flat: Tensor) -> Tensor:
        """Return its elements of the flat partition, or of the partition's gradient."""
        return flat.narrow(0, self.offset, self.fragment.numel)


def is_factored(fragment: Fragment) -> bool:
    """Return whether the parameter has rows and columns."""
    return len(fragment.shape) >= 2


def matrix_numel(fragment: Fragment) -> int:
    """Return the elements of one of the parameter's matrices."""
    return math.prod(fragment.shape[-2:])


def span_of(fragment: Fragment) -> Span:
    """Return the first matrix that the part reaches into, and the first one after it."""
    numel = matrix_numel(fragment)
    return fragment.start // numel, -(-(fragment.start + fragment.numel) // numel)


def begun_in(fragment: Fragment) -> Span:
    """Return the same for the matrices that begin in the part: those of all ranks tile the parameter."""
    numel = matrix_numel(fragment)
    return -(-fragment.start // numel), -(-(fragment.start + fragment.numel) // numel)


def shared_matrices(fragments: Iterable[Fragment]) -> list[int]:
    """Return the matrices of a parameter that several of its parts reach into; the parts are in order."""
    spans = [span_of(fragment) for fragment in fragments if fragment.numel]
    return sorted({after[0] for before, after in itertools.pairwise(spans) if after[0] < before[1]})


class Adafactor(torch.optim.Optimizer):
    """Adafactor at a given rate, without momentum.

        R, C <- beta R, C + (1 - beta) mean of g^2 over columns, over rows      beta = 1 - t^-0.8 at step t
        u = g / sqrt(R C / mean(R)); of a vector g / sqrt(V)                    V like R and C, by element
        p <- p - lr (u / max(1, rms(u)) + weight_decay p)                       rms over the whole parameter

    R, C and rms are of whole parameters: the ranks add up their parts of the sums. Source: Shazeer and Stern, arXiv
    1804.04235, as transformers has it with `scale_parameter=False` and `relative_step=False`, including the matrices of
    a convolution over its last two dimensions.

    Args:
        parameters: The weights. Under ZeRO, this rank's one flat partition takes their place.
        lr: The rate, which is also the largest root mean square of a parameter's step.
        weight_decay: Decoupled weight decay.
        device: What the ranks communicate on.
    """

    kinds: tuple[str, ...] = ()
    """States of each weight: none."""

    def __init__(
        self, parameters: Iterable[Tensor], *, lr: float, weight_decay: float = 0.0, device: torch.device
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self._device = device
        self._pieces: list[Piece] = []
        self._numels: list[int] = []
        self._num_shared = 0

    def bind(self, partition: Partition) -> None:
        """Learn which parts of the parameters lie in this rank's flat partition; collective."""
        (flat,) = partition.flats()
        weights = dict(partition.trained)
        mine = [partition.fragment(name, weight) for name, weight in partition.trained]
        everyones: list[list[Fragment]] = [[]] * partition.world_size
        torch.distributed.all_gather_object(everyones, mine)
        self._numels = [math.prod(fragment.shape) for fragment in mine]
        for index, (fragment, *parts) in enumerate(zip(mine, *everyones, strict=True)):
            shared = []
            for number in shared_matrices(parts) if is_factored(fragment) else ():
                first, last = span_of(fragment)
                if fragment.numel and first <= number < last:
                    shared.append((number - first, self._num_shared))
                self._num_shared += sum(fragment.shape[-2:])
            if fragment.numel:
                offset = partition.place(weights[fragment.name]).start
                self._pieces.append(Piece(index, fragment, offset, _no_squares(fragment, flat), shared))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights, and use their gradients up; collective."""
        (group,) = self.param_groups
        (flat,) = group["params"]
        if flat.grad is None:
            return
        if not self.state[flat]:
            self.create(flat, num_steps=0)
        self.state[flat]["step"] += 1
        beta = 1 - self.state[flat]["step"] ** DECAY
        for piece, sums in zip(self._pieces, self._sums(flat.grad), strict=True):
            _average(piece, sums, beta)
        norms = torch.zeros(len(self._numels), dtype=torch.float64, device=flat.device)
        for piece in self._pieces:
            update = piece.cut(flat.grad)
            update.mul_(_inverse_root(piece))
            norms[piece.index] = update.square().sum(dtype=torch.float64)
        norms = sum_over_ranks(norms, self._device)
        roots = (norms / torch.tensor(self._numels, device=norms.device)).sqrt().tolist()
        flat.add_(flat, alpha=-group["lr"] * group["weight_decay"])
        for piece in self._pieces:
            rate = group["lr"] / max(1.0, roots[piece.index] / CLIP)
            piece.cut(flat).add_(piece.cut(flat.grad), alpha=-rate)

    def _sums(self, grad: Tensor) -> list[dict[str, Tensor]]:
        """Return the sums of squared gradients of every piece over its whole matrices; collective."""
        sums = [_sums_of_part(piece, piece.cut(grad)) for piece in self._pieces]
        buffer = torch.zeros(self._num_shared, device=grad.device)
        places = [
            (sums_of_one[kind][matrix], place + (0 if kind == ROWS else piece.fragment.shape[-2]))
            for piece, sums_of_one in zip(self._pieces, sums, strict=True)
            for matrix, place in piece.shared
            for kind in (ROWS, COLUMNS)
        ]
        for values, place in places:
            buffer[place : place + len(values)] = values
        if self._num_shared:
            buffer = sum_over_ranks(buffer, self._device)
        for values, place in places:
            values.copy_(buffer[place : place + len(values)])
        return sums

    # The state, as checkpoints know it.

    def create(self, flat: Tensor, num_steps: int) -> None:
        """Note the number of steps of a flat partition."""
        self.state[flat]["step"] = num_steps

    def scalars(self) -> dict[str, float]:
        """Return the states that are no tensors: none but the number of steps."""
        return {}

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """Load the output of `scalars`."""

    def factors(self) -> Iterator[tuple[str, Fragment, Tensor]]:
        """Yield the averages by kind; those of the matrices that begin on this rank."""
        for piece in self._pieces:
            span = begun_in(piece.fragment) if is_factored(piece.fragment) else (0, 0)
            for kind, part in _parts(piece.fragment, span):
                first = 0 if kind == ELEMENTS else part.start - span_of(piece.fragment)[0] * part.shape[-1]
                yield kind, part, piece.squares[kind].view(-1)[first : first + part.numel]

    def wanted_factors(self) -> list[tuple[str, Fragment]]:
        """Return what `load_factors` needs: all matrices that this rank reaches into."""
        spans = [span_of(each.fragment) if is_factored(each.fragment) else (0, 0) for each in self._pieces]
        return [part for piece, span in zip(self._pieces, spans, strict=True) for part in _parts(piece.fragment, span)]

    def load_factors(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load the averages of `wanted_factors`, by kind and name of the parameter."""
        for piece in self._pieces:
            for kind, squares in piece.squares.items():
                squares.view(-1).copy_(tensors[kind][piece.fragment.name])


def _no_squares(fragment: Fragment, like: Tensor) -> dict[str, Tensor]:
    if not is_factored(fragment):
        return {ELEMENTS: torch.zeros(fragment.numel, device=like.device)}
    (first, last), (rows, columns) = span_of(fragment), fragment.shape[-2:]
    return {
        ROWS: torch.zeros(last - first, rows, device=like.device),
        COLUMNS: torch.zeros(last - first, columns, device=like.device),
    }


def _sums_of_part(piece: Piece, grad: Tensor) -> dict[str, Tensor]:
    """Sum the part's squared gradients over columns and over rows; of a vector, square them."""
    if not is_factored(piece.fragment):
        return {ELEMENTS: grad.square()}
    whole = torch.nn.functional.pad(grad.square(), piece.padding).view(-1, *piece.fragment.shape[-2:])
    return {ROWS: whole.sum(dim=-1), COLUMNS: whole.sum(dim=-2)}


def _average(piece: Piece, sums: dict[str, Tensor], beta: float) -> None:
    num_summed = {ELEMENTS: 1}
    if is_factored(piece.fragment):
        num_summed = dict(zip((COLUMNS, ROWS), piece.fragment.shape[-2:], strict=True))
    for kind, squares in piece.squares.items():
        squares.mul_(beta).add_(sums[kind] / num_summed[kind] + EPS, alpha=1 - beta)


def _inverse_root(piece: Piece) -> Tensor:
    """Return the factor of each of the part's gradients: 1 / sqrt of its averaged square."""
    if not is_factored(piece.fragment):
        return piece.squares[ELEMENTS].rsqrt()
    rows, columns = piece.squares[ROWS], piece.squares[COLUMNS]
    whole = (rows / rows.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1) * columns.rsqrt().unsqueeze(-2)
    before, _ = piece.padding
    return whole.view(-1)[before : before + piece.fragment.numel]


def _parts(fragment: Fragment, span: Span) -> list[tuple[str, Fragment]]:
    """Return kinds and fragments of the averages of a span of matrices; of a vector, those of its part."""
    if not is_factored(fragment):
        return [(ELEMENTS, fragment)]
    shape, num_matrices = fragment.shape, span[1] - span[0]
    lengths = {ROWS: (shape[-2], shape[:-1]), COLUMNS: (shape[-1], (*shape[:-2], shape[-1]))}
    return [
        (kind, Fragment(fragment.name, span[0] * length, num_matrices * length, whole))
        for kind, (length, whole) in lengths.items()
        if num_matrices
    ]
