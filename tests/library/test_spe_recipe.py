"""The recipe: rates, metrics, presets, penalties, and an artifact that predicts as the trained network does."""

import pytest
import torch
from torch import Tensor

from library.artifact import open_artifact
from library.errors import ArtifactError, InputError
from library.recipe import evaluation_batches, fit, make_batch
from library.spe.batch import collate_graphs
from library.spe.encode import bare_samples
from library.spe.network import GraphNetwork
from library.spe.predictor import GraphPredictor
from library.spe.presets import PRESETS
from library.spe.recipe import SpeRecipe, load_network
from library.spe.settings import Backbone, Encoding, Schema
from library.spectral.graphs import Graphs

TINY = {
    "batch_size": 16,
    "train_graphs": 64,
    "encoding": Encoding(eigenpairs=8, width=4, channels=2, rho_layers=1, rho_hidden=8, mlp_hidden=8),
    "backbone": Backbone(layers=1, hidden=8),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[SpeRecipe, list[dict[str, float]], str]:
    recipe, curve = SpeRecipe(steps=30, lr=1e-2, **TINY), []
    fit(recipe, path=tmp_path_factory.mktemp("spe") / "a", callbacks=[lambda step, metrics: curve.append(metrics)])
    return recipe, curve, str(tmp_path_factory.getbasetemp() / "spe0" / "a")


def test_training_lowers_the_loss_and_the_artifact_predicts_as_the_network(trained):
    recipe, curve, path = trained
    first, last = (sum(m["loss"] for m in part) for part in (curve[:6], curve[-6:]))
    assert last < 0.9 * first
    artifact = open_artifact(path, kind="spe")
    network, loaded, schema = load_network(artifact)
    assert loaded == recipe
    splits = recipe.datasets()
    batches = evaluation_batches(splits, splits.validation, 64)
    found = recipe.evaluate(network, batches)
    assert found["mae"] == pytest.approx(artifact.metrics["mae"], rel=1e-5)
    assert artifact.manifest.data == splits.fingerprint
    predictor = GraphPredictor.from_artifact(artifact)
    answers = predictor.answer([predictor.molecule("CCO"), predictor.molecule("c1ccccc1C=O")])
    alone = predictor.answer([predictor.molecule("c1ccccc1C=O")])[0]
    torch.testing.assert_close(alone.values, answers[1].values, rtol=1e-4, atol=1e-5)
    assert answers[0].gap == float("inf")
    assert alone.encodings.shape == (8, 4)
    assert alone.phi.shape == (8, 2)
    assert schema.targets == ("penalised_logp",)


def test_what_bonds_matter_is_the_difference_without_them(trained):
    predictor = GraphPredictor.from_artifact(open_artifact(trained[2]))
    given = predictor.molecule("CCO")
    changes = predictor.sensitivities(given)
    whole = predictor.answer([given])[0].values
    cut = predictor.graph(given.nodes.tolist(), [given.edges[:, 1].tolist()], [1], "graph")
    torch.testing.assert_close(changes[0], predictor.answer([cut])[0].values - whole, rtol=1e-4, atol=1e-5)
    assert predictor.sensitivities(predictor.molecule("C")).shape == (0, 1)


def test_bad_graphs_are_refused_by_name(trained):
    predictor = GraphPredictor.from_artifact(open_artifact(trained[2]))
    for make, message in (
        (lambda: predictor.molecule("C[Si]"), r"smiles: atom 1, 'Si.*is none of the 28 types"),
        (lambda: predictor.graph([0, 28], [[0, 1]], [1], "g"), "g: a node has type 28; types are 0 to 27"),
        (lambda: predictor.graph([0, 1], [[0, 1]], [], "g"), "g: 1 edges have 0 types"),
        (lambda: predictor.graph([0, 1], [[0, 2]], [1], "g"), "g: edge 0 joins nodes"),
        (lambda: predictor.graph([0, 1], [[0, 1, 1]], [1], "g"), "g: an edge is a pair of nodes"),
        (lambda: predictor.graph([0, 1, 2], [[0.9, 1.7]], [1], "g"), "g: an edge is a pair of nodes, two integers"),
        (lambda: predictor.graph([0, 1, 2], ["ab"], [1], "g"), "g: an edge is a pair of nodes"),
        (lambda: predictor.graph([0, 1, 2], [1, 2], [1, 1], "g"), "g: an edge is a pair of nodes"),
        (lambda: predictor.graph([0, 1, 2], [[]], [1], "g"), "g: an edge is a pair of nodes"),
        (lambda: predictor.graph([0, 1], [[True, False]], [1], "g"), "g: an edge is a pair of nodes"),
        (lambda: predictor.answer([]), "there are no graphs"),
        (lambda: predictor.graph([0, 1], [[1, 1]], [1], "g"), "g: edge 0 is a self-loop"),
        (lambda: predictor.graph([0, 1], [[0, 1], [1, 0]], [1, 1], "g"), "g: edge 1, .* is listed twice"),
    ):
        with pytest.raises(InputError, match=message):
            make()
    many = predictor.graph([0] * 12, [], [], "g")
    with pytest.raises(InputError, match=r"second: .*which is its first"):
        predictor.answer([predictor.molecule("CC"), many], names=["first", "second"])


def test_each_batch_is_encoded_once_and_each_target_has_its_sensitivity():
    schema, encoding = Schema(node_types=2, targets=("a", "b")), TINY["encoding"]
    predictor = GraphPredictor(GraphNetwork(encoding, TINY["backbone"], schema), encoding, schema)
    calls, rho = [], predictor.network.encoder.rho
    rho.register_forward_hook(lambda *_: calls.append(1))
    given = predictor.graph([0, 1, 1], [[0, 1], [1, 2]], [0, 0], "g")
    [found] = predictor.answer([given])
    assert len(calls) == 1
    batch = collate_graphs(bare_samples(Graphs.from_edges([3], [[0, 1], [1, 2]]), encoding), eigenpairs=8)
    batch = batch._replace(nodes=given.nodes)
    torch.testing.assert_close(found.values, predictor.network(batch)[0].double().detach())
    assert predictor.sensitivities(predictor.graph([0], [], [], "g")).shape == (0, 2)
    assert predictor.sensitivities(given).shape == (2, 2)


def test_without_encodings_nothing_is_diagonalised_and_no_cut_refused(monkeypatch):
    schema, encoding = Schema(node_types=1), Encoding(method="none", eigenpairs=2, split="error")
    predictor = GraphPredictor(GraphNetwork(encoding, TINY["backbone"], schema), encoding, schema)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    ring, apart = [[0, 1], [1, 2], [2, 3], [3, 0]], []
    found = predictor.answer([predictor.graph([0] * 4, edges, [0] * len(edges), "g") for edges in (ring, apart)])
    for answer in found:
        assert torch.isfinite(answer.values).all()
        assert (len(answer.eigenvalues), answer.multiplicities, answer.gap) == (0, [], float("inf"))
        assert answer.encodings is None
        assert answer.phi is None


def test_bad_features_are_refused_by_name():
    schema = Schema(node_features=2, edge_features=1)
    predictor = GraphPredictor(GraphNetwork(TINY["encoding"], TINY["backbone"], schema), TINY["encoding"], schema)
    assert predictor.graph([[0.5, 1.0]], [], [], "g").nodes.shape == (1, 2)
    for nodes, message in (
        ([[0.5]], "g: a node needs 2 features"),
        ([3], "g: a node needs 2 features"),
        ([[0.5, float("nan")]], "g: a node has a feature that is NaN or infinite"),
        ([[None, 0.5]], "g: a node has a feature that is no number"),
        ([["a", "b"]], "g: a node has a feature that is no number"),
        (["ab"], "g: a node needs 2 features"),
    ):
        with pytest.raises(InputError, match=message):
            predictor.graph(nodes, [], [], "g")
    with pytest.raises(InputError, match="smiles: the model was not trained on molecules"):
        predictor.molecule("CCO")


def test_foreign_artifacts_are_refused(trained, tmp_path):
    recipe = trained[0]
    other = recipe.model_copy(update={"backbone": Backbone(layers=2, hidden=8), "steps": 1})
    artifact = fit(other, path=tmp_path / "other")
    renamed = open_artifact(trained[2])
    object.__setattr__(artifact.manifest, "recipe", renamed.recipe)
    with pytest.raises(ArtifactError, match="of another model"):
        load_network(artifact)


class Fixed(torch.nn.Module):
    """Outputs that are known, batch after batch."""

    def __init__(self, outputs: Tensor, centre: float, scale: float) -> None:
        super().__init__()
        self.outputs, self.place = outputs, 0
        self.centre, self.scale = torch.tensor([centre]), torch.tensor([scale])

    def forward(self, batch) -> Tensor:
        self.place += len(batch.counts)
        return self.outputs[self.place - len(batch.counts) : self.place]


def test_metrics_are_their_formulas():
    recipe = SpeRecipe(data="hiv-size", **TINY)
    splits = recipe.datasets()
    labels = torch.stack([splits.validation[i].target for i in range(200)])[:, 0]
    scores = torch.randn(200, 1, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    batches = [make_batch(splits, splits.validation, range(a, a + 50), range(50)) for a in range(0, 200, 50)]
    found = recipe.evaluate(Fixed(scores, 0, 1), iter(batches))
    above = scores[labels > 0] - scores[labels == 0].T
    expected = ((above > 0).double() + 0.5 * (above == 0)).mean()
    assert found["auroc"] == pytest.approx(float(expected), rel=1e-9)
    assert found["error"] == pytest.approx(1 - float(expected), rel=1e-9)
    counting = SpeRecipe(data="counting", target="cycles4", **TINY)
    splits = counting.datasets()
    batch = make_batch(splits, splits.validation, range(50), range(50))
    model = Fixed(torch.zeros(50, 1), 3.0, 2.0)
    expected = (batch.targets - 3).abs().mean()
    assert counting.evaluate(model, [batch])["mae"] == pytest.approx(float(expected), rel=1e-6)
    model.place = 0
    assert float(counting.losses(model, batch)["loss"]) == pytest.approx(float(expected) / 2, rel=1e-6)


def test_unknown_targets_do_not_count():
    recipe = SpeRecipe(**TINY)
    splits = recipe.datasets()
    whole = make_batch(splits, splits.train, range(8), range(8))
    holes = whole._replace(targets=whole.targets.clone().index_fill_(0, torch.tensor([1, 5]), torch.nan))
    model = Fixed(torch.zeros(8, 1), 0, 1)
    loss = recipe.losses(model, holes)["loss"]
    assert recipe.count(holes) == 6
    keep = [0, 2, 3, 4, 6, 7]
    assert float(loss) == pytest.approx(float(whole.targets[keep].abs().mean()), rel=1e-6)


def test_the_rate_rises_and_falls_and_biases_do_not_decay():
    recipe = SpeRecipe(steps=300, warmup=100, lr=0.5, weight_decay=0.1, **TINY)
    model = recipe.model()
    optimizer = recipe.optimizer(model)
    schedule, rates = recipe.schedule(optimizer), []
    for _ in range(300):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [rates[i] for i in (0, 50, 100, 200)] == pytest.approx([0, 0.25, 0.5, 0.25])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    biases = {id(p) for name, p in model.named_parameters() if "bias" in name}
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == biases
    assert SpeRecipe(warmup=None).schedule(optimizer) is None


@pytest.mark.parametrize("norm", [True, False])
def test_a_lipschitz_penalty_lowers_the_bound(norm):
    encoding = TINY["encoding"].model_copy(update={"phi_norm": norm})
    bounds = []
    for penalty in (0.0, 0.3):
        recipe = SpeRecipe(steps=30, lr=1e-2, lipschitz_penalty=penalty, **TINY | {"encoding": encoding})
        network = load_network(fit(recipe))[0]
        bounds.append(float(network.encoder.phi.lipschitz_bound(8).mean().detach()))
    assert bounds[1] < 0.8 * bounds[0]
    with pytest.raises(ValueError, match="lipschitz_penalty needs"):
        SpeRecipe(lipschitz_penalty=0.1, encoding=Encoding(phi="one"))


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(ValueError, match="no preset 'zinc'; there are zinc-full, zinc-8"):
        SpeRecipe(preset="zinc")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_set_what_they_name_and_no_more(name):
    recipe = SpeRecipe(preset=name, steps=7, seed=3, data="counting", lr=0.7)
    assert (recipe.steps, recipe.seed, recipe.data) == (7, 3, "counting")
    assert recipe.lr == PRESETS[name]["lr"] != 0.7
    assert SpeRecipe.model_validate(recipe.model_dump(mode="json")) == recipe


def joined_scale(over_nodes: str) -> tuple[float, float]:
    """Untrained, on the molecules of the HIV screen: the encodings' deviation over that of the features that they join,
    and the correlation of their largest part with the number of nodes."""
    encoding = Encoding(eigenpairs=32, width=16, rho_hidden=16, mlp_hidden=16, norm="layer", over_nodes=over_nodes)
    recipe = SpeRecipe(data="hiv-scaffold", encoding=encoding, backbone=Backbone(layers=3, hidden=32))
    torch.manual_seed(0)
    network, splits = recipe.model(), recipe.datasets()
    batch = next(iter(evaluation_batches(splits, splits.train, 64)))
    with torch.no_grad():
        joined = network.join(network.encode(batch))
        features = network.nodes(batch.nodes)
    main = torch.linalg.svd(joined - joined.mean(0), full_matrices=False)[0][:, 0]
    sizes = batch.counts[batch.graph_of_node].float()
    return float(joined.std() / features.std()), float(torch.corrcoef(torch.stack([main, sizes]))[0, 1].abs())


def test_the_mean_over_nodes_keeps_encodings_of_the_size_of_features():
    (summed, with_size), (averaged, _) = joined_scale("sum"), joined_scale("mean")
    assert summed > 20
    assert with_size > 0.9
    assert averaged < 2
    assert SpeRecipe().encoding.over_nodes == "mean"
    assert SpeRecipe(preset="zinc-full").encoding.over_nodes == "sum"


def test_eigenpairs_are_kept_by_content(tmp_path):
    recipe = SpeRecipe(cache=str(tmp_path), data="hiv-scaffold", **TINY)
    first = recipe.samples("test")[3]
    assert len(list(tmp_path.iterdir())) == 1
    again = SpeRecipe(data="hiv-scaffold", **TINY).samples("test")[3]
    assert torch.equal(first.values, again.values)
    with pytest.raises(InputError, match="has no part 'ood_test'"):
        SpeRecipe(**TINY).samples("ood_test")
    with pytest.raises(InputError, match="train_graphs: 20000 are asked for"):
        SpeRecipe(**TINY | {"train_graphs": 20000}).samples("train")
