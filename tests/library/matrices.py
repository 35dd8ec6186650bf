"""Matrices of a known spectrum, and the generators that draw them."""

import torch


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(spectrum: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A symmetric float64 matrix with these eigenvalues in random directions."""
    n = len(spectrum)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator(seed), dtype=torch.float64)).Q
    a = (q * spectrum) @ q.mT
    return (a + a.mT) / 2


def spike_and_bulk(n: int) -> torch.Tensor:
    """Four large eigenvalues and a bulk in [0, 1], as a float64 matrix."""
    spectrum = torch.cat([torch.tensor([100.0, 80, 60, 40]), torch.rand(n - 4, generator=generator())])
    return with_spectrum(spectrum.double())
