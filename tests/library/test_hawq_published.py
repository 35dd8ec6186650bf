from pathlib import Path

import numpy as np
import pytest

from library.errors import InputError
from library.hawq.published import FRACTIONS, published, published_choice

GOLDEN = Path(__file__).parents[1] / "golden" / "hawq"


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
@pytest.mark.parametrize("kind", ["size", "bops", "latency"])
@pytest.mark.parametrize("fraction", [0.25, 0.75])
def test_published_configurations_are_found(network, kind, fraction):
    case = np.load(GOLDEN / f"ilp_{network}.npz")
    found = published_choice(network, kind, fraction)
    assert found.bits == tuple(case[f"{kind}_{fraction}_bits"].tolist())
    assert found.omega == pytest.approx(float(case[f"{kind}_{fraction}_omega"]), rel=1e-9)
    assert found.lower_bound <= found.omega <= found.published_omega
    assert found.cost <= found.limit
    unit = {"size": 1e6 / 2**20 if network == "resnet18" else 1.0, "bops": 1e3 / 1024, "latency": 1.0}[kind]
    assert found.cost * unit == pytest.approx(float(case[f"{kind}_{fraction}_cost"]), rel=1e-9)


def test_one_published_configuration_is_not_the_best():
    worse = [
        (network, kind, fraction)
        for network in ("resnet18", "resnet50")
        for kind in ("size", "bops", "latency")
        for fraction in FRACTIONS
        if (found := published_choice(network, kind, fraction)).published_bits != found.bits
    ]
    assert worse == [("resnet50", "size", 0.25)]
    found = published_choice(*worse[0])
    assert found.published_omega == pytest.approx(0.0831, abs=5e-5)
    assert found.omega == pytest.approx(0.0749, abs=5e-5)
    sizes = np.array(published("resnet50").sensitivity.layers.n_params)
    assert sizes @ found.published_bits / 8e6 <= found.limit
    with pytest.raises(InputError, match="not of 'vgg'"):
        published("vgg")
