"""Learning rates against published ones, and inside the plain loop over a recipe that knows nothing of them."""

import copy
import pickle
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from library import farms
from library.errors import InputError
from library.farms.analysis import Settings
from library.farms.balance import Balance, Balanced
from library.farms.rates import rate_factors
from library.recipe import Recipe, Splits, fit, seeded_model

GOLDEN = Path(__file__).parents[1] / "golden" / "farms"
TAILS = Settings(window=8, ops=2)


def test_published_rates():
    golden = np.load(GOLDEN / "allocation.npz")
    low, high, base = (float(golden[name]) for name in ("lr_min_ratio", "lr_max_ratio", "lr_base"))
    for rule, name in (("linear", "linear_map"), ("sqrt", "sqrt"), ("log2", "log2"), ("step", "step")):
        found = base * rate_factors(golden["lr_alphas"], rule, low=low, high=high)
        assert found.numpy() == pytest.approx(golden[f"lr_tb_{name}"], abs=1e-9)


def test_the_extremes_and_the_mean_of_the_maps():
    alphas = torch.rand(30, generator=torch.Generator().manual_seed(0)).double() * 4 + 2
    linear = rate_factors(alphas, low=0.2, high=1.8)
    assert (float(linear.min()), float(linear.max())) == pytest.approx((0.2, 1.8))
    assert (linear.argmin(), linear.argmax()) == (alphas.argmin(), alphas.argmax())
    for rule in ("sqrt", "log2"):
        assert float(rate_factors(alphas, rule).mean()) == pytest.approx(1.0)
    sigmoid = rate_factors(torch.tensor([2.0, 3.0, 4.0, 1e3, -994.0]), "sigmoid", strength=(0.25, 0.5))
    assert float(sigmoid[3]) == pytest.approx(10**0.25)
    assert float(sigmoid[4]) == pytest.approx(10**-0.125)
    assert rate_factors([2.0, 3.0, 4.0], "sigmoid").tolist()[1] == pytest.approx(1.0)


def test_what_has_no_exponent_keeps_the_global_rate():
    assert rate_factors([2.0, float("nan"), 4.0], low=0.5, high=1.5).tolist() == [0.5, 1.0, 1.5]
    assert rate_factors([3.0, 3.0]).tolist() == [1.0, 1.0]
    assert rate_factors([float("nan")] * 2).tolist() == [1.0, 1.0]
    assert Balance(low=0.2).factors([3.0, 2.0]).tolist() == [1.8, 0.2]
    assert Balance(low=0.2, high=1.2).factors([3.0, 2.0]).tolist() == [1.2, 0.2]
    assert Balance(first=False, last=False).factors([9.0, 2.0, 4.0, 1.5]).tolist() == [1.0, 0.5, 1.5, 1.0]
    with pytest.raises(InputError, match="0 < low <= high"):
        rate_factors([1.0, 2.0], low=0)
    with pytest.raises(InputError, match="above 1"):
        rate_factors([1.0, 2.0], "log2")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rate_factors([2.0, 2.0], "bogus"), "map 'bogus' is unknown"),
        (lambda: rate_factors([-1.0, 2.0, 3.0], "sqrt"), "sqrt map needs every alpha above 0, got -1"),
        (lambda: rate_factors([1.0, 2.0], high=float("inf")), "both finite"),
        (lambda: rate_factors([1.0, 2.0], "sigmoid", sharpness=float("nan")), "must be finite"),
    ],
)
def test_rates_that_cannot_be_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_factors_keep_their_precision_when_the_model_is_cast():
    model = nn.Sequential(copy.deepcopy(seeded_model(BalancedNet())))  # inside an engine's wrapper
    model[0].rate_factors.fill_(1.2345678)
    model.bfloat16()
    assert model[0].conv.weight.dtype == torch.bfloat16
    assert model[0].rate_factors.dtype == torch.float64
    assert float(model[0].rate_factors[0]) == 1.2345678
    assert pickle.loads(pickle.dumps(model))[0].rate_factors.dtype == torch.float64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1)
        self.scale = nn.LayerNorm(16)
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        hidden = self.deep(torch.relu(self.norm(self.conv(x)))).flatten(2)
        return self.head(self.scale(hidden).flatten(1))


class NetRecipe(Recipe, frozen=True, extra="forbid"):
    """A recipe with a schedule that works on its own last rate, as torch's cosine does."""

    kind: ClassVar[str] = "net"
    steps: int = 12
    batch_size: int = 8

    def datasets(self) -> Splits:
        generator = torch.Generator().manual_seed(1)
        data = [(torch.randn(1, 4, 4, generator=generator), i % 10) for i in range(24)]

        def collate(samples, keys):
            return torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])

        return Splits(data, data, data, collate, "net")

    def model(self):
        return Net()

    def optimizer(self, model):
        decay = [p for p in model.parameters() if p.ndim > 1]
        return torch.optim.SGD(
            [{"params": decay, "weight_decay": 1e-3}, {"params": [p for p in model.parameters() if p.ndim < 2]}], lr=0.1
        )

    def schedule(self, optimizer):
        return CosineAnnealingLR(optimizer, self.steps)

    def losses(self, model, batch):
        return {"loss": F.cross_entropy(model(batch[0]), batch[1])}

    def count(self, batch):
        return len(batch[1])


class BalancedNet(Balanced, NetRecipe, frozen=True, extra="forbid"):
    """The same with a rate for every layer."""


def rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters()}


def test_each_layer_gets_the_recipes_own_rate_times_its_factor():
    recipe = BalancedNet(balance=Balance(every=2, analysis=TAILS))
    model = seeded_model(recipe)
    optimizer = recipe.optimizer(model)
    schedule = recipe.schedule(optimizer)
    plain_optimizer = NetRecipe().optimizer(model)
    plain = NetRecipe().schedule(plain_optimizer)
    assert set(rates(optimizer, model).values()) == {0.1}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-3, 0}
    metrics = {}
    for step in range(1, 7):
        for one, other in ((optimizer, schedule), (plain_optimizer, plain)):
            one.step()
            other.step()
        metrics = recipe.after_step(model, step) or metrics
    alphas = farms.analyze(model, TAILS)["alpha"]
    assert metrics["alpha_max"] == pytest.approx(alphas.max())
    conv, deep, head = rate_factors(alphas.to_numpy()).tolist()
    assert len({conv, deep, head}) == 3
    eta = plain_optimizer.param_groups[0]["lr"]
    expected = {"conv": conv, "norm": conv, "deep": deep, "head": head, "scale": 1.0}
    for name, rate in rates(optimizer, model).items():
        assert rate == pytest.approx(eta * expected[name.split(".")[0]], rel=1e-12), name


def test_equal_factors_train_as_without():
    plain = fit(NetRecipe()).weights()
    same = fit(BalancedNet(balance=Balance(low=1.0, every=1, analysis=TAILS))).weights()
    other = fit(BalancedNet(balance=Balance(every=1, analysis=TAILS))).weights()
    assert all(torch.equal(same[name], value) for name, value in plain.items())
    assert not torch.equal(other["deep.weight"], plain["deep.weight"])
    assert same["rate_factors"].tolist() == [1.0, 1.0, 1.0]
    assert sorted(other["rate_factors"].tolist())[::2] == [0.5, 1.5]
