"""Lanczos for operators whose basis fits no single worker: rows of the basis are shared out, and every step is kept.

With n rows, m steps and w workers each worker holds m n / w numbers per start vector; the vector of a step alone is
whole, because a product needs it. What a step found is a file of its own, so an interrupted run goes on where it was.
"""

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from library import collective, files
from library.errors import ArtifactError, InputError
from library.spectral.density import Tridiagonal
from library.spectral.trace import Operator, product

SAME = 1e-3  # relative difference at which a kept run counts as one of another operator or start


def sharded_lanczos(operator: Operator, start: Tensor, steps: int, *, folder: str | Path | None = None) -> Tridiagonal:
    """`lanczos` with its basis shared over the workers of a run, and kept after each step when there is a `folder`.

    Every worker calls it with the same operator (data-parallel, as `CurvatureOperator` is) and the same start (n, p);
    all get the same result. A later call with the same `folder`, number of workers, operator and start takes up the
    steps that are there; one product tells whether they belong to it. The recurrence and its re-orthogonalisation are
    those of `library.spectral.density.lanczos`.

    Raises InputError for a zero or non-finite start, fewer than one step, or a folder that holds the run of another
    operator or start; ArtifactError for a file that cannot be read.
    """
    n, columns = start.shape
    if steps < 1:
        raise InputError(f"Lanczos needs at least one step, got {steps}")
    norms = torch.linalg.vector_norm(start, dim=0)
    if not bool((torch.isfinite(norms) & (norms > 0)).all()):
        raise InputError("Lanczos cannot start from a zero or non-finite vector")
    steps = min(steps, n)
    rows = collective.share(n)
    mine = slice(rows.start, rows.stop)
    basis = start.new_zeros(steps + 1, len(rows), columns)
    basis[0] = (start / norms)[mine]
    diagonal, off_diagonal = _kept(folder, basis, steps)
    if diagonal:
        first = collective.all_sum((basis[0] * product(operator, start / norms)[mine]).sum(0))
        if not torch.allclose(first, diagonal[0], rtol=SAME, atol=SAME * float(diagonal[0].abs().max())):
            raise InputError(f"{folder} holds the Lanczos run of another operator or start; choose another folder")
    tolerance = 10 * n**0.5 * torch.finfo(start.dtype).eps
    for step in range(len(diagonal), steps):
        if diagonal and not bool(off_diagonal[-1].any()):
            break
        image = product(operator, _whole(basis[step], mine, n))[mine]
        rayleigh = collective.all_sum((basis[step] * image).sum(0))
        known, rest = basis[: step + 1], image
        for _ in range(2):
            shadow = collective.all_sum(torch.einsum("mrp,rp->mp", known, rest))
            rest = rest - torch.einsum("mrp,mp->rp", known, shadow)
        norm = collective.all_sum(rest.square().sum(0)).sqrt()
        running = off_diagonal[-1] > 0 if off_diagonal else torch.ones_like(norm, dtype=torch.bool)
        scale = torch.stack([*(value.abs() for value in (*diagonal, rayleigh)), norm]).amax(0)
        diagonal.append(torch.where(running, rayleigh, diagonal[0] if diagonal else rayleigh))
        alive = running & (norm > tolerance * scale)
        off_diagonal.append(torch.where(alive, norm, 0.0))
        basis[step + 1] = torch.where(alive, rest / norm, 0.0)
        if folder is not None:
            content = {"next": basis[step + 1], "diagonal": diagonal[-1], "off_diagonal": off_diagonal[-1]}
            saved = safetensors.torch.save({name: value.cpu().contiguous() for name, value in content.items()})
            files.write_bytes(_file(folder, step), saved)
    beside = torch.stack(off_diagonal[:-1], -1) if len(diagonal) > 1 else start.new_zeros(columns, 0)
    return Tridiagonal(torch.stack(diagonal, -1), beside, off_diagonal[-1])


def _kept(folder: str | Path | None, basis: Tensor, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """Entries of the steps that every worker has kept; their vectors are put into the basis."""
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    if folder is None:
        return diagonal, off_diagonal
    there = 0
    while there < steps and _file(folder, there).is_file():
        there += 1
    for step in range(min(collective.all_gather(there))):
        try:
            found = safetensors.torch.load_file(_file(folder, step), device=str(basis.device))
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{_file(folder, step)} cannot be read: {error}") from error
        if found["next"].shape != basis.shape[1:]:
            raise InputError(f"{folder} holds the Lanczos run of another operator or start; choose another folder")
        basis[step + 1] = found["next"]
        diagonal.append(found["diagonal"])
        off_diagonal.append(found["off_diagonal"])
    return diagonal, off_diagonal


def _file(folder: str | Path, step: int) -> Path:
    part = f"{collective.rank():05d}-of-{collective.world_size():05d}"
    return Path(folder) / f"lanczos-{step:05d}-{part}.safetensors"


def _whole(rows: Tensor, mine: slice, n: int) -> Tensor:
    vector = rows.new_zeros(n, rows.shape[1])
    vector[mine] = rows
    return collective.all_sum(vector)
