"""Eigenpairs of many graphs' Laplacians, cuts that keep eigenspaces whole, and the energy of signals over them."""

from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from library import files
from library.errors import InputError, PrismError
from library.spectral.eigen import extreme_eigenpairs
from library.spectral.graph_laplacians import (
    Laplacian,
    check_signals,
    dense_laplacians,
    graph_sums,
    laplacian_matrix,
    quotients,
    unit_signals,
)
from library.spectral.graphs import Graphs, ragged_ranges, size_buckets
from library.spectral.trace import random_probes

Split = Literal["shrink", "extend", "keep", "error"]
GAP = 1e-6  # eigenvalues nearer to each other than this are one eigenspace
DENSE_NODES = 2048  # a graph of more nodes, of which few eigenpairs are asked, is left to Lanczos
DENSE_ENTRIES = 1 << 24  # matrix entries that are diagonalised at once
BLOCK = 8  # vectors that Lanczos multiplies at once


@dataclass(frozen=True)
class GraphSpectra:
    """Eigenpairs of each graph, smallest eigenvalue first; all float64.

    `sizes` (graphs,) nodes and `counts` (graphs,) pairs of each graph. `values` holds the eigenvalues of one graph
    after those of another, `vectors` their matrices (nodes, pairs) in row order likewise. `gaps` (graphs,) is the
    distance from a graph's last eigenvalue to its next one, infinite where all were taken: a gap below 1e-6 says that
    the cut splits an eigenspace, whose chosen vectors are then arbitrary.
    """

    sizes: Tensor
    counts: Tensor
    values: Tensor
    vectors: Tensor
    gaps: Tensor

    def __len__(self) -> int:
        return len(self.sizes)

    def graph(self, place: int) -> tuple[Tensor, Tensor]:
        """Eigenvalues (pairs,) and eigenvectors (nodes, pairs) of one graph."""
        nodes, count = int(self.sizes[place]), int(self.counts[place])
        first, entry = (int(firsts[place]) for firsts in self._firsts)
        return self.values[first : first + count], self.vectors[entry : entry + nodes * count].reshape(nodes, count)

    @cached_property
    def _firsts(self) -> tuple[Tensor, Tensor]:
        """Where each graph's eigenvalues, and the entries of its eigenvectors, begin."""
        return _firsts(self.counts), _firsts(self.sizes * self.counts)

    def select(self, chosen: Tensor) -> "GraphSpectra":
        """The spectra of the chosen graphs, in that order."""
        first, entry = (firsts[chosen] for firsts in self._firsts)
        values = self.values[ragged_ranges(first, self.counts[chosen])]
        vectors = self.vectors[ragged_ranges(entry, (self.sizes * self.counts)[chosen])]
        return GraphSpectra(self.sizes[chosen], self.counts[chosen], values, vectors, self.gaps[chosen])

    def padded(self, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Eigenvalues (graphs, width) and eigenvectors (nodes, width), with zeros behind a graph's own pairs.

        `width` is by default the largest count. Raises InputError when it is less.
        """
        most = int(self.counts.max())
        width = most if width is None else width
        if width < most:
            raise InputError(f"width {width} is less than the {most} eigenpairs of a graph")
        places = ragged_ranges(torch.arange(len(self)).to(self.counts) * width, self.counts)
        values = self.values.new_zeros(len(self) * width).index_copy(0, places, self.values)
        rows = self.counts.repeat_interleave(self.sizes)
        places = ragged_ranges(torch.arange(len(rows)).to(rows) * width, rows)
        vectors = self.vectors.new_zeros(len(rows) * width).index_copy(0, places, self.vectors)
        return values.unflatten(0, (len(self), width)), vectors.unflatten(0, (len(rows), width))

    def multiplicities(self, place: int, *, gap: float = GAP) -> list[int]:
        """Dimensions of one graph's eigenspaces, smallest eigenvalue first."""
        return eigenspaces(self.graph(place)[0], gap=gap)


def eigenpairs(
    graphs: Graphs,
    *,
    count: int | None = None,
    laplacian: Laplacian = "normalised",
    isolated: Literal[0, 1] = 0,
    split: Split = "shrink",
    gap: float = GAP,
    dense_nodes: int = DENSE_NODES,
    cache: Path | None = None,
) -> GraphSpectra:
    """The `count` smallest eigenpairs of each graph's Laplacian, or all of them, in float64.

    Graphs of one size are diagonalised together. A graph of more than `dense_nodes` nodes, of which a count is asked,
    goes to thick-restart Lanczos, with the null space known from its connected components, and again without what was
    found until no copy of a repeated eigenvalue is missing. A graph with fewer nodes than `count` gives all its pairs.

    A cut that falls between two eigenvalues nearer than `gap` would split an eigenspace. `split` says what is done
    then: "shrink" takes fewer pairs and "extend" more, up to the nearest gap; "error" refuses; "keep" cuts all the
    same, and the result's `gaps` tell. "shrink" refuses a graph whose first eigenspace is larger than `count`.

    `cache` is a folder that keeps results by the content of the batch and these options. Signs and bases within an
    eigenspace are arbitrary. Raises InputError for options that there are not and refused cuts, PrismError when Lanczos
    does not converge.

    >>> from library.spectral.graphs import Graphs
    >>> star = Graphs.from_edges([4], [[0, 0, 0], [1, 2, 3]])
    >>> spectra = eigenpairs(star)
    >>> spectra.values.round(decimals=6).abs().tolist(), spectra.multiplicities(0)
    ([0.0, 1.0, 1.0, 2.0], [1, 2, 1])
    """
    _check_options(count, isolated, split)
    file = None
    if cache is not None:
        file = cache / f"{_key(graphs, count, laplacian, isolated, split, gap, dense_nodes)}.safetensors"
        if file.is_file():
            return _read(file, graphs.device)
    wanted = graphs.sizes if count is None else graphs.sizes.clamp(max=count)
    found: list[tuple[Tensor, Tensor, float] | None] = [None] * len(graphs)
    large = torch.zeros_like(graphs.sizes, dtype=torch.bool)
    if count is not None:
        large = (graphs.sizes > dense_nodes) & (wanted < graphs.sizes)
    for bucket in _equal_sizes(graphs.sizes, (~large).nonzero().flatten()):
        chosen = graphs.select(bucket)
        values, vectors = torch.linalg.eigh(dense_laplacians(chosen, laplacian, isolated=isolated))
        size = values.shape[1]
        for place, own, basis in zip(bucket.tolist(), values, vectors, strict=True):
            kept = _cut(own, int(wanted[place]), size, split, gap, place)
            found[place] = own[:kept], basis[:, :kept], float(own[kept] - own[kept - 1]) if kept < size else torch.inf
    for place in large.nonzero().flatten().tolist():
        found[place] = _large(graphs.select([place]), int(count), laplacian, isolated, split, gap, place)
    spectra = GraphSpectra(
        graphs.sizes,
        torch.tensor([len(values) for values, _, _ in found], device=graphs.device),
        torch.cat([values for values, _, _ in found]),
        torch.cat([vectors.flatten() for _, vectors, _ in found]),
        torch.tensor([distance for _, _, distance in found], dtype=torch.float64, device=graphs.device),
    )
    if file is not None:
        _write(file, spectra)
    return spectra


def eigenspaces(values: Tensor, *, gap: float = GAP) -> list[int]:
    """Dimensions of the eigenspaces of ascending eigenvalues (pairs,): a new one starts after a step above `gap`.

    >>> eigenspaces(torch.tensor([0.0, 0.5, 0.5 + 1e-9, 2.0]))
    [1, 2, 1]
    """
    starts = [0, *((values.diff() > gap).nonzero().flatten() + 1).tolist(), len(values)]
    return [after - before for before, after in pairwise(starts) if after > before]


def spectral_energies(graphs: Graphs, spectra: GraphSpectra, signals: Tensor) -> Tensor:
    """f_k = (u_k^T x)^2 / x^T x of node signals (nodes, channels) at every eigenvalue: (sum of counts, channels).

    Rows follow `spectra.values`. With all eigenpairs, the energies of a graph add up to 1, or to 0 where a signal
    vanishes. Inside a repeated eigenvalue only their sum does not depend on the basis. Raises InputError for signals of
    a wrong shape, NaN and infinity.
    """
    signals = signals.double()
    check_signals(graphs, signals)
    signals = unit_signals(graphs, signals)
    parts = zip(
        spectra.vectors.split((spectra.sizes * spectra.counts).tolist()),
        signals.split(graphs.sizes.tolist()),
        strict=True,
    )
    coefficients = torch.cat([vectors.reshape(len(own), -1).mT @ own for vectors, own in parts])
    squares = graph_sums(graphs, signals.square()).repeat_interleave(spectra.counts, 0)
    return quotients(coefficients.square(), squares)


def accumulated_energy(values: Tensor, energies: Tensor, points: Tensor) -> Tensor:
    """F(t) = sum of the energies at eigenvalues up to t, of one graph: (points, channels).

    `values` (pairs,) ascending, `energies` (pairs, channels) from `spectral_energies`, `points` (points,) the t.
    Values within 1e-9 above t count, so that F is whole at a repeated eigenvalue. The area above F, the integral of
    1 - F from 0 to the largest eigenvalue, is the Rayleigh quotient. Source: Dong, Zhang, Wang, "Rayleigh Quotient
    Graph Neural Networks for Graph-level Anomaly Detection", 2024.
    """
    running = torch.cat([energies.new_zeros(1, energies.shape[1]), energies.cumsum(0)])
    return running[torch.searchsorted(values.contiguous(), points.to(values) + 1e-9, right=True)]


def _check_options(count: int | None, isolated: int, split: str) -> None:
    if count is not None and (isinstance(count, bool) or not isinstance(count, Integral) or count < 1):
        raise InputError(f"count must be an integer and at least 1, got {count!r}")
    if isolated not in (0, 1):
        raise InputError(f"isolated must be 0 or 1, got {isolated!r}")
    if split not in get_args(Split):
        raise InputError(f"there is no split {split!r}; there are {', '.join(get_args(Split))}")


def _firsts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


def _equal_sizes(sizes: Tensor, chosen: Tensor) -> list[Tensor]:
    """The chosen graphs in batches of one size each, so that no padding meets the eigenvalues."""
    buckets = []
    for size in sizes[chosen].unique().tolist():
        same = chosen[sizes[chosen] == size]
        buckets += [same[part] for part in size_buckets(sizes[same], budget=DENSE_ENTRIES, power=2)]
    return buckets


def _cut(values: Tensor, wanted: int, size: int, split: Split, gap: float, place: int) -> int:
    """How many of the ascending `values` are taken; those known may be fewer than `size`."""
    if wanted >= size or split == "keep":
        return wanted
    steps = values.diff() > gap  # steps[k - 1]: a cut after k pairs splits nothing
    if bool(steps[wanted - 1]):
        return wanted
    where = (
        f"the cut after {wanted} eigenpairs of graph {place} splits the eigenspace of {float(values[wanted - 1]):.6g}"
    )
    if split == "error":
        raise InputError(f"{where}; choose another count, or split shrink, extend or keep")
    if split == "shrink":
        below = steps[: wanted - 1].nonzero()
        if len(below) == 0:
            raise InputError(f"{where}, which is its first; choose a larger count, or split extend or keep")
        return int(below[-1]) + 1
    above = steps[wanted:].nonzero()
    return wanted + int(above[0]) + 1 if len(above) else len(values)


def _large(
    graph: Graphs, count: int, laplacian: Laplacian, isolated: Literal[0, 1], split: Split, gap: float, place: int
) -> tuple[Tensor, Tensor, float]:
    """The smallest eigenpairs of one large sparse graph, and the distance to the next eigenvalue.

    Lanczos may miss copies of a repeated eigenvalue. So what was found, Z, is taken out, and Lanczos is asked for more
    of (I - Z Z^T)(c I - L)(I - Z Z^T): the smallest eigenvalue that is left says up to where Z is complete.
    """
    matrix = laplacian_matrix(graph, laplacian, isolated=isolated)
    size = graph.num_nodes
    top = 2.0 if laplacian == "normalised" else 2.0 * float(graph.degrees.max())
    vectors = _null_space(graph, laplacian, isolated)
    values = vectors.new_zeros(vectors.shape[1])

    def operator(block: Tensor) -> Tensor:
        block = block - vectors @ (vectors.mT @ block)
        image = top * block - matrix @ block
        return image - vectors @ (vectors.mT @ image)

    generator = torch.Generator().manual_seed(0)
    while len(values) < size:
        more = min(max(count + 1 - len(values), BLOCK), size - len(values))
        start = random_probes(size, BLOCK, generator=generator, kind="gaussian", device=graph.device)
        pairs = extreme_eigenpairs(operator, start, largest=more, generator=generator, tolerance=1e-10, limit=50 * size)
        if not bool(pairs.converged.all()):
            raise PrismError(f"the eigenpairs of graph {place} ({size} nodes) did not converge; ask for fewer")
        new = top - pairs.values
        complete = values < new[0] - gap
        known = torch.cat([values[complete], new[:1]])
        if len(known) > count:
            kept = _cut(known, count, size, split, gap, place)
            if kept < len(known):
                return known[:kept], vectors[:, complete][:, :kept], float(known[kept] - known[kept - 1])
        values, order = torch.cat([values, new]).sort()
        vectors = torch.linalg.qr(torch.cat([vectors, pairs.vectors], 1)[:, order]).Q
    kept = _cut(values, count, size, split, gap, place)
    return values[:kept], vectors[:, :kept], float(values[kept] - values[kept - 1]) if kept < size else torch.inf


def _null_space(graph: Graphs, laplacian: Laplacian, isolated: Literal[0, 1]) -> Tensor:
    """An orthonormal basis (nodes, components) of the signals without energy."""
    component = graph.components
    signal = graph.degrees.sqrt() if laplacian == "normalised" else torch.ones_like(graph.degrees)
    if laplacian == "normalised" and isolated == 0:
        signal = torch.where(graph.degrees > 0, signal, 1.0)
    basis = torch.zeros(len(signal), int(component.max()) + 1, dtype=torch.float64, device=graph.device)
    basis[torch.arange(len(signal), device=graph.device), component] = signal
    basis = basis[:, basis.any(0)]
    return basis / torch.linalg.vector_norm(basis, dim=0)


def _key(graphs: Graphs, *options: object) -> str:
    content = sha256(repr(options).encode())
    for part in (graphs.sizes, graphs.edges, graphs.edge_weights):
        content.update(part.cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:32]


def _write(file: Path, spectra: GraphSpectra) -> None:
    from safetensors.torch import save

    files.write_bytes(
        file, save({field.name: getattr(spectra, field.name).cpu().contiguous() for field in fields(spectra)})
    )


def _read(file: Path, device: torch.device) -> GraphSpectra:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return GraphSpectra(**{name: value.to(device) for name, value in load(file.read_bytes()).items()})
    except (SafetensorError, OSError, TypeError) as error:
        raise PrismError(f"the cached spectra {file} cannot be read: {error}; delete the file") from error
