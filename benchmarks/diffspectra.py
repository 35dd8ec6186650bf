"""Time the restructured DiffSpectra against a plain transcription of the published formulation, in one run.

The plain form is what the released code computes: edge lists over all pairs with gathers and scatters, conditions of
noise level and spectrum mapped per edge, the first coordinate map unsplit, and the encoder of spectra inside every
pass of the network. Both share one set of weights, and their outputs are compared before anything is timed.

    python -m benchmarks.diffspectra [--size paper|small] [--molecules N] [--atoms N] [--repeat N] [--threads N]
        [--out FILE.json]
"""

import argparse
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.timing import median_seconds
from library.diffspectra.attention import FORBIDDEN, Block, CoordinateUpdate, RelationalAttention
from library.diffspectra.basis import GaussianBasis
from library.diffspectra.conditioned import Conditioned
from library.diffspectra.denoiser import DenoiserSettings
from library.diffspectra.lines import POINTS
from library.diffspectra.noise import draw_noise, key_generators
from library.diffspectra.samplers import dpm_solver
from library.diffspectra.scaling import State, centred
from library.diffspectra.schedule import noise_schedule
from library.diffspectra.specformer import SpecFormerSettings

SCHEDULE = noise_schedule("cosine")
SAMPLER_STEPS = 10
SIZES = {
    "paper": (SpecFormerSettings.paper(), DenoiserSettings.paper(dropout=0.0)),
    "small": (SpecFormerSettings(), DenoiserSettings(dropout=0.0)),
}


def plain_basis(basis: GaussianBasis, squared: Tensor, condition: Tensor) -> Tensor:
    """The basis of squared distances (edges, 1), with conditions mapped per edge (edges, condition)."""
    scale, shift = basis.modulation(F.silu(condition)).chunk(2, -1)
    u = squared * (1 + scale) + shift
    deviation = basis.deviations.abs() + 1e-5
    bells = torch.exp(-0.5 * ((u - basis.means) / deviation) ** 2) / (math.sqrt(2 * math.pi) * deviation)
    return torch.cat([u, bells], -1)


def normalised(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def plain_attention(
    net: RelationalAttention, h: Tensor, e: Tensor, source: Tensor, target: Tensor, a: Tensor
) -> Tensor:
    """Attention over an edge list, normalised at the target."""
    width = h.shape[1]
    query, key = (linear(h).view(-1, net.learned, net.channels) for linear in (net.query, net.key))
    gate = net.score_gate(e).tanh().view(-1, net.learned, net.channels)
    learned = (query[target] * key[source] * gate).sum(-1) / math.sqrt(width // net.heads)
    score = torch.cat([torch.where(a > 0, 1.0, FORBIDDEN), learned], -1)
    top = torch.full((len(h), net.heads), -math.inf).scatter_reduce(
        0, target[:, None].expand_as(score), score, "amax", include_self=False
    )
    share = (score - top[target]).exp()
    share = share / torch.zeros(len(h), net.heads).index_add(0, target, share)[target]
    value = net.value(h).view(-1, net.heads, width // net.heads)[source]
    message = value * net.value_gate(e).tanh().view_as(value) * share[..., None]
    return torch.zeros(len(h), width).index_add(0, target, message.flatten(1))


def plain_coordinates(
    net: CoordinateUpdate,
    x: Tensor,
    h: Tensor,
    e: Tensor,
    d: Tensor,
    edges: tuple[Tensor, Tensor],
    a: Tensor,
    c: Tensor,
) -> Tensor:
    """The coordinate update over an edge list, by the unsplit map."""
    row, column = edges
    weight = torch.cat([net.receiver.weight, net.sender.weight, net.pair.weight, net.distance.weight], 1)
    joint = F.linear(torch.cat([h[row], h[column], e, d], -1), weight, net.receiver.bias)
    joint = normalised(joint, *net.modulation(F.silu(c)).chunk(2, -1))
    channels = net.weight(F.silu(net.hidden(joint))).tanh()
    factor = (channels * torch.cat([torch.ones_like(a[:, :1]), a], -1)).mean(-1, keepdim=True)
    difference = x[row] - x[column]
    step = difference / difference.norm(dim=-1, keepdim=True).clamp(min=1e-8) * net.kappa
    return x + torch.zeros_like(x).index_add(0, row, factor * step)


def plain_block(
    block: Block,
    h: Tensor,
    e: Tensor,
    x: Tensor,
    edges: tuple[Tensor, Tensor],
    a: Tensor,
    tau: Tensor,
    per_edge: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """A block over atoms (atoms, width) and an edge list."""
    source, target = edges
    d = plain_basis(block.basis, (x[source] - x[target]).square().sum(-1, keepdim=True), per_edge)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.node_modulation(F.silu(tau)).chunk(6, -1)
    pair = block.pair_modulation(F.silu(per_edge)).chunk(6, -1)
    joined = normalised(block.join(torch.cat([d, e], -1)), pair[0], pair[1])
    mixed = plain_attention(block.attention, normalised(h, shift_a, scale_a), joined, source, target, a)
    h = normalised(h + gate_a * mixed, shift_m, scale_m)
    h = h + gate_m * block.node_mlp(h)
    e = normalised(e + pair[2] * block.message(mixed[source] + mixed[target]), pair[3], pair[4])
    e = e + pair[5] * block.pair_mlp(e)
    return h, e, plain_coordinates(block.coordinates, x, h, e, d, edges, a, per_edge)


def plain(
    network: Conditioned, noisy: State, level: Tensor, spectra: dict[str, Tensor], mask: Tensor, previous: State | None
) -> State:
    """The whole network, spectra included, in the published formulation."""
    net, (b, n) = network.denoiser, mask.shape
    previous = previous or State(torch.zeros_like(noisy.nodes), torch.zeros_like(noisy.edges))
    molecule, i, j = (mask[:, :, None] & mask[:, None] & ~torch.eye(n, dtype=torch.bool)).nonzero().T
    place = mask.flatten().cumsum(0) - 1
    source, target = place[molecule * n + i], place[molecule * n + j]
    tau = net.level(level) + network.encode(spectra)[0]
    per_node, per_edge = tau[mask.nonzero()[:, 0]], tau[molecule]
    x, last = noisy.positions[mask], previous.positions[mask]
    guess = (last[source] - last[target]).square().sum(-1, keepdim=True)
    d = plain_basis(net.basis, guess, per_edge) * (guess != 0).any()
    known = previous.edges[molecule, i, j]
    a = torch.cat([known[:, :1] >= 0, guess <= net.settings.neighbour], -1).float()
    h = net.node_input(torch.cat([noisy.features[mask], previous.features[mask]], -1))
    e = net.pair_input(torch.cat([noisy.edges[molecule, i, j], known, d], -1))
    nodes, pairs = [h], [e]
    for block, node_skip, pair_skip in zip(net.blocks, net.node_skips, net.pair_skips, strict=True):
        h, e, x = plain_block(block, h, e, x, (source, target), a, per_node, per_edge)
        whole = torch.zeros(b, n, 3)
        whole[mask] = x
        x = centred(whole, mask)[mask]
        nodes.append(node_skip(h))
        pairs.append(pair_skip(e))
    out = torch.zeros(b, n, 9)
    out[mask] = torch.cat([x, net.node_head(torch.cat(nodes, -1))], -1)
    edges = torch.zeros(b, n, n, 2)
    every = torch.cat(pairs, -1)
    edges[molecule, i, j] = torch.cat([net.exists_head(every), net.order_head(every)], -1)
    return State(out, (edges + edges.transpose(1, 2)) / 2)


def measure(size: str, molecules: int, atoms: int, repeat: int) -> list[dict]:
    """Rows of what is timed: seconds plain and restructured. Raises AssertionError when the two forms disagree."""
    torch.manual_seed(0)
    network = Conditioned(*SIZES[size]).eval()
    counts = torch.linspace(max(3, atoms - 6), atoms, molecules).round().long()  # as a group of similar sizes has
    mask = torch.arange(atoms) < counts[:, None]
    noisy, previous = (draw_noise(mask, key_generators(range(k, k + molecules))) for k in (0, 1000))
    spectra = {m: torch.rand(molecules, POINTS[m]) for m in network.encoder.settings.modalities}
    level = torch.linspace(-4, 4, molecules)

    with torch.no_grad():
        for last in (None, previous):
            for ours, theirs in zip(
                network(noisy, level, spectra, mask, last),
                plain(network, noisy, level, spectra, mask, last),
                strict=True,
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    def step(form: Callable[[State | None], State]) -> None:
        with torch.no_grad():
            first = form(None)
        network.zero_grad(set_to_none=True)
        found = form(first)
        (found.nodes.square().mean() + found.edges.square().mean()).backward()

    def ours_step() -> None:
        condition = network.encode(spectra)[0]
        step(lambda last: network.denoiser(noisy, level, condition, mask, last))

    @torch.no_grad()
    def ours_sampling() -> None:
        condition = network.encode(spectra)[0]
        dpm_solver(
            lambda state, _, last: network.denoiser(state, level, condition, mask, last),
            noisy,
            SCHEDULE,
            steps=SAMPLER_STEPS,
        )

    @torch.no_grad()
    def plain_sampling() -> None:
        dpm_solver(
            lambda state, _, last: plain(network, state, level, spectra, mask, last),
            noisy,
            SCHEDULE,
            steps=SAMPLER_STEPS,
        )

    network.train()
    rows = [
        {
            "what": "training step, self-conditioned",
            "plain": median_seconds(
                lambda: step(lambda last: plain(network, noisy, level, spectra, mask, last)), repeat
            ),
            "restructured": median_seconds(ours_step, repeat),
        }
    ]
    network.eval()
    found = {"plain": median_seconds(plain_sampling, repeat), "restructured": median_seconds(ours_sampling, repeat)}
    rows.append({"what": f"{SAMPLER_STEPS} sampler steps, the encoder included", **found})
    return rows


def report(rows: list[dict], console: Console) -> float:
    """Print seconds and ratios; the least of the ratios."""
    table = Table(title="Seconds, and how many times faster")
    for name in ("what", "plain", "restructured", "ratio"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in rows:
        ratio = row["plain"] / row["restructured"]
        table.add_row(row["what"], f"{row['plain']:.3f}", f"{row['restructured']:.3f}", f"{ratio:.1f}")
    console.print(table)
    least = min(row["plain"] / row["restructured"] for row in rows)
    console.print(f"at least {least:.1f} times faster")
    return least


def main() -> None:
    """Parse the command line, measure, print, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="paper", help="the published sizes, or the default ones")
    parser.add_argument("--molecules", type=int, default=8, help="molecules in a batch")
    parser.add_argument("--atoms", type=int, default=18, help="atoms of the largest molecule")
    parser.add_argument("--repeat", type=int, default=3, help="timings of each, whose median counts")
    parser.add_argument("--threads", type=int, default=1, help="threads of the linear algebra")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.size, options.molecules, options.atoms, options.repeat)
    ratio = report(rows, Console())
    if options.out:
        machine = {"processor": platform.machine(), "threads": options.threads, "torch": torch.__version__}
        options.out.write_text(json.dumps({"machine": machine, "rows": rows, "ratio": ratio}, indent=2) + "\n")


if __name__ == "__main__":
    main()
