"""Windows of one shape out of a weight matrix, and the spectra of all of them.

A matrix of any shape is covered by windows of n' rows and m' = int(n' Q) columns at evenly strided places, so that the
shape of the layer no longer decides the shape of its spectrum. Source: Hu, Goel, Killiakov, Yang, ICML 2025, section 4
and the published LLM_Pruning code (linear layers) and Image_Classification code (convolutions).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import InputError
from library.spectral.tails import squared_singular_values

BATCH_BYTES = 256 << 20  # of windows and Gram matrices that are held at once
CONV_SCALE = 0.5  # a convolution's slices are multiplied by sqrt(1/2), so their squared singular values by this


@dataclass(frozen=True)
class Grid:
    """Windows of `rows` x `columns` that start at (a row_step, b column_step), a < row_count, b < column_count."""

    rows: int
    columns: int
    row_step: int
    column_step: int
    row_count: int
    column_count: int

    @property
    def count(self) -> int:
        """How many windows there are."""
        return self.row_count * self.column_count

    def overlaps(self) -> tuple[Tensor, Tensor]:
        """How far places share their rows, float64 (row_count, row_count), and their columns.

        The share of window (a, b) that lies in window (c, d) is rows[a, c] columns[b, d].
        """
        rows = _triangle(self.row_count, self.row_step, self.rows)
        return rows, _triangle(self.column_count, self.column_step, self.columns)


def window_grid(
    shape: tuple[int, int], *, window: int, ratio: float = 1.0, ops: int = 15, step: int | None = None
) -> Grid:
    """The grid of windows of at most `window` rows on a matrix of that shape.

    n' = min(window, rows, columns), and m' = int(n' ratio); where that is wider than the matrix (ratio > 1), n' is the
    largest whose m' fits, so that the ratio is kept. With `ops` windows per dimension the stride down the rows is
    max(1, (rows - n') // (ops - 1)), and the number of places min(ops, (rows - n') // stride + 1), across the columns
    likewise; the floor may leave up to ops - 2 rows at the far edge unseen. With `step` the stride is that, and the
    number of places (rows - n') // step + 1.

    Raises InputError for a shape that is not (rows, columns), window < 1, a ratio that is not positive and finite,
    ops < 2, step < 1, and a ratio so extreme that no window fits.

    >>> window_grid((512, 64), window=64, ops=6)
    Grid(rows=64, columns=64, row_step=89, column_step=1, row_count=6, column_count=1)
    """
    if len(shape) != 2:
        raise InputError(f"windows are of a matrix (rows, columns), got the shape {tuple(shape)}")
    if window < 1 or not 0 < ratio < math.inf or ops < 2 or (step is not None and step < 1):
        raise InputError(
            f"windows need window >= 1, finite ratio > 0, ops >= 2 and step >= 1, "
            f"got window={window}, ratio={ratio}, ops={ops}, step={step}"
        )
    rows, columns = shape
    high = min(window, rows, columns)
    if int(high * ratio) > columns:
        high = int((columns + 1) / ratio) + 1
        while int(high * ratio) > columns:
            high -= 1
    wide = int(high * ratio)
    if high < 1 or wide < 1:
        raise InputError(f"no window of ratio {ratio:g} and at most {window} rows fits a matrix of {rows} x {columns}")
    row_step, row_count = _places(rows - high, ops, step)
    column_step, column_count = _places(columns - wide, ops, step)
    return Grid(high, wide, row_step, column_step, row_count, column_count)


def window_spectra(matrix: Tensor, grid: Grid) -> Tensor:
    """Squared singular values of every window, row by row: (rows, columns) -> (windows, min(n', m')), float64.

    A few windows are copied and multiplied at once, so that the memory is that of the matrix and `BATCH_BYTES`.
    """
    down = matrix.unfold(0, grid.rows, grid.row_step)[: grid.row_count]
    windows = down.unfold(1, grid.columns, grid.column_step)[:, : grid.column_count]
    short = min(grid.rows, grid.columns)
    each = 8 * (grid.rows * grid.columns + 3 * short * short)
    places = torch.arange(grid.count, device=matrix.device)
    parts = [
        squared_singular_values(windows[part // grid.column_count, part % grid.column_count])
        for part in places.split(max(1, BATCH_BYTES // each))
    ]
    return torch.cat(parts)


def kernel_slices(weight: Tensor) -> Tensor:
    """The slices of a convolution, one per place of its kernel: (out, in, *kernel) -> (places, out, in)."""
    return weight.flatten(2).movedim(2, 0)


def block_spectra(weight: Tensor, ratio: float = 1.0) -> Tensor:
    """Spectra of a convolution's blocks: (out, in, *kernel) -> (positions, places of the kernel, eigenvalues), float64.

    Each slice is made tall (R x C, R >= C) and cut into R // C blocks down its rows, the rest ignored: C x int(C ratio)
    for ratio <= 1, and int(C / ratio) x C for a larger one. Squared singular values are times 1/2, as published. Raises
    InputError for a ratio that is not positive and finite, or one so extreme that no block is left.
    """
    if not 0 < ratio < math.inf:
        raise InputError(f"the ratio of windows must be positive and finite, got {ratio}")
    slices = kernel_slices(weight)
    if slices.shape[1] < slices.shape[2]:
        slices = slices.mT
    rows, columns = slices.shape[1:]
    high, wide = (columns, int(columns * ratio)) if ratio <= 1 else (int(columns / ratio), columns)
    if high < 1 or wide < 1:
        raise InputError(f"no block of ratio {ratio:g} fits slices of {rows} x {columns}")
    blocks = slices.unfold(1, high, high)[:, : rows // columns].mT[..., :wide]
    return CONV_SCALE * squared_singular_values(blocks.movedim(0, 1))


def slice_spectra(weight: Tensor) -> Tensor:
    """Spectra of a convolution's whole slices, times 1/2: (out, in, *kernel) -> (places, min(out, in)), float64."""
    return CONV_SCALE * squared_singular_values(kernel_slices(weight))


def _places(room: int, ops: int, step: int | None) -> tuple[int, int]:
    """Stride and number of places of a window that may move by `room`."""
    if step is not None:
        return step, room // step + 1
    stride = max(1, room // (ops - 1))
    return stride, min(ops, room // stride + 1)


def _triangle(count: int, step: int, length: int) -> Tensor:
    places = torch.arange(count, dtype=torch.float64) * step
    return (1 - (places[:, None] - places).abs() / length).clamp(min=0)


def ladder(ops: int) -> Iterator[int]:
    """3, 5, 9, 17, ... windows per dimension, each but the last about twice the one before, up to `ops`."""
    rung = 3
    while rung < ops:
        yield rung
        rung = 2 * rung - 1
    yield ops
