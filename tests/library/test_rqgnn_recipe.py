"""Training, artifact and detector of RQGNN: what is learnt, kept, and refused."""

import doctest
import itertools
import math

import pytest
import torch
from pydantic import ValidationError

from library.artifact import Artifact, open_artifact
from library.errors import ArtifactError, InputError
from library.recipe import fit, seeded_model
from library.rqgnn import GraphAnomalyDetector, RqgnnRecipe, data, detector, recipe
from library.rqgnn.recipe import margins_of
from library.spectral import Graphs, eigenpairs, rayleigh_quotients
from library.weights import load_tensors

SMALL = RqgnnRecipe(steps=12, batch_size=256, hidden=16, depth=4)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    return fit(SMALL, path=tmp_path_factory.mktemp("rqgnn") / "artifact")


@pytest.fixture(scope="module")
def trained(artifact) -> GraphAnomalyDetector:
    return GraphAnomalyDetector.from_artifact(artifact)


def test_a_planted_signal_anomaly_is_found() -> None:
    found = fit(RqgnnRecipe(data="simulated", steps=60, batch_size=64, hidden=16, rq_on="raw"))
    assert found.metrics["auc"] > 0.95
    assert found.metrics["best_macro_f1"] > 0.9


def test_the_presets_set_the_networks_switches() -> None:
    official = RqgnnRecipe(preset="official", filters="learned", pooling="max")
    assert official.switches()["filters"] == "frozen"
    assert official.model().theta.shape == (6, 50, 200)
    paper = seeded_model(RqgnnRecipe(preset="paper"))
    assert paper.query_first is None
    assert paper.theta.requires_grad
    assert RqgnnRecipe(data="simulated").material().vocabulary is None


def test_a_reloaded_network_gives_the_same_logits_to_the_bit(artifact) -> None:
    for changes in ({}, {"filters": "learned"}):
        chosen = SMALL.model_copy(update={"steps": 3} | changes)
        saved = fit(chosen) if changes else artifact
        again = chosen.model()  # other random weights, filters too
        load_tensors(again, saved.weights())
        material = chosen.material()
        first = margins_of(again, material.prepared, material.test, 512)
        second = margins_of(GraphAnomalyDetector.from_artifact(saved).model, material.prepared, material.test, 512)
        assert torch.equal(first, second)


def test_the_detector_repeats_the_recipes_numbers(artifact, trained) -> None:
    material = SMALL.material()
    chosen = material.validation
    own = data.load_graphs(SMALL.data).select(chosen)
    kinds = [own.vocabulary[i] for i in own.kinds.tolist()]
    ends = own.graphs.offsets.tolist()
    found = trained.detect(own.graphs, kinds=[kinds[a:b] for a, b in itertools.pairwise(ends)])
    margins = margins_of(trained.model, material.prepared, chosen, 512)
    expected = trained.decision.scaling.probability(margins)
    assert torch.tensor([f.probability for f in found]).double() == pytest.approx(expected, abs=1e-6)
    assert trained.metrics(
        trained.prepared(own.graphs, kinds=[kinds[a:b] for a, b in itertools.pairwise(ends)], labels=own.labels)
    )["auc"] == pytest.approx(artifact.metrics["auc"], abs=1e-3)
    called = torch.tensor([f.anomalous for f in found])
    assert bool(called.any())
    assert torch.equal(called, expected >= trained.decision.threshold)
    lenient = trained.detect(own.graphs.select([0]), kinds=[kinds[: ends[1]]], threshold=0.0)
    assert lenient[0].anomalous


def test_the_evidence_is_of_the_graph_alone(trained) -> None:
    ring = Graphs.from_edges([6, 2], [[0, 1, 2, 3, 4, 0, 6], [1, 2, 3, 4, 5, 5, 7]])
    both = trained.detect(ring, kinds=[["C"] * 6, ["C", "Xx"]], explain=True)
    one = trained.detect(ring.select([0]), kinds=[["C"] * 6], explain=True)
    assert both[0].probability == pytest.approx(one[0].probability, abs=1e-6)
    found = both[0].evidence
    carbon = trained.vocabulary.symbols.index("C")
    assert torch.allclose(found.eigenvalues, eigenpairs(ring.select([0])).values)
    assert found.energies.shape == (41, 16)
    assert float(found.energies[0, carbon]) == pytest.approx(1)  # the same atom everywhere on a ring: no change
    assert float(found.energies[:, carbon - 1 if carbon else 1].abs().max()) == 0
    assert float(both[0].quotients[carbon]) == pytest.approx(0, abs=1e-6)
    assert both[0].present.tolist() == [i == carbon for i in range(16)]
    assert len(found.node_scores) == 6
    assert float(found.node_scores.std()) < 1e-4  # all nodes of a ring are alike
    assert 0 <= float(found.percentiles[carbon]) <= 100
    assert both[1].present.sum() == 2  # the unknown kind counts as other
    signal = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    expected = float(rayleigh_quotients(Graphs.from_edges([2], [[0], [1]]), signal))
    assert float(both[1].quotients[carbon]) == pytest.approx(expected)


def test_the_reference_is_of_training_normals(trained) -> None:
    curves = trained.reference
    carbon = trained.vocabulary.symbols.index("C")
    assert bool((curves.mean[carbon].diff() >= -1e-12).all())
    assert float(curves.mean[carbon, -1]) == pytest.approx(1)
    assert bool((curves.low <= curves.mean + 1e-12).all() & (curves.mean <= curves.high + 1e-12).all())
    middle = trained.reference.percentile(curves.quantiles[:, 50][None])
    assert float(middle[0, carbon]) == pytest.approx(50, abs=2)


def test_what_the_detector_refuses(trained, artifact, tmp_path) -> None:
    edge = Graphs.from_edges([2], [[0], [1]])
    for options, message in (
        ({}, "kinds: this model needs"),
        ({"features": torch.ones(2, 3)}, "kinds: this model needs"),
        ({"kinds": [["C"]]}, "graph 0 has 2 nodes and 1 kinds"),
        ({"kinds": []}, "kinds: 0 lists for 1 graphs"),
        ({"kinds": [["C", "C"], ["C"]]}, "kinds: 2 lists for 1 graphs"),
        ({"kinds": [["C", "C"]], "threshold": math.nan}, "threshold must be within"),
        ({"kinds": [["C", "C"]], "threshold": 7}, "threshold must be within .0, 1., got 7"),
    ):
        with pytest.raises(InputError, match=message):
            trained.detect(edge, **options)
    alone = trained.detect(Graphs.from_edges([1], []), kinds=[["C"]])
    assert alone[0].without_edges
    assert math.isfinite(alone[0].probability)
    with pytest.raises(InputError, match="none of the 50"):
        GraphAnomalyDetector.from_artifact(fit(SMALL.model_copy(update={"steps": 1, "preset": "official"}))).detect(
            edge, kinds=[["C", "Xx"]]
        )
    file = artifact.path / "vocabulary.json"
    broken = tmp_path / "broken"
    broken.mkdir()
    for part in artifact.path.iterdir():
        (broken / part.name).write_bytes(part.read_bytes())
    (broken / "vocabulary.json").write_bytes(file.read_bytes()[:-1] + b" ")
    with pytest.raises(ArtifactError, match="SHA-256"):
        open_artifact(broken)


def test_a_batch_of_one_graph_cannot_be_normalised() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        RqgnnRecipe(batch_size=1)
    model, material = SMALL.model(), SMALL.material()
    with pytest.raises(InputError, match="at least 2 samples"):
        model.train()(material.prepared.batch(torch.tensor([3])))


def test_a_detector_of_features_checks_them() -> None:
    found = fit(RqgnnRecipe(data="simulated", steps=2, batch_size=64, hidden=8))
    own = GraphAnomalyDetector.from_artifact(found)
    edge = Graphs.from_edges([2], [[0], [1]])
    assert len(own.detect(edge, features=torch.ones(2, 1), explain=True)) == 1
    for features, message in (
        (None, "this model needs 1 features"),
        (torch.ones(2, 2), "shape .2, 2."),
        (torch.tensor([[1.0], [math.nan]]), "NaN"),
        (torch.full((2, 1), 1e30), "feature 0 of graph 0 is too large"),
        (torch.full((2, 1), 1e20).double(), "feature 0 of graph 0 is too large"),
    ):
        with pytest.raises(InputError, match=message):
            own.detect(edge, features=features)


def test_a_score_that_is_no_number_is_no_decision(trained, monkeypatch) -> None:
    edge = Graphs.from_edges([2], [[0], [1]])
    monkeypatch.setattr(trained, "scores", lambda prepared: (torch.tensor([math.nan]).double(), torch.ones(2)))
    with pytest.raises(InputError, match="graph 0 has no finite score"):
        trained.detect(edge, kinds=[["C", "C"]])


@pytest.mark.parametrize("module", [data, detector, recipe])
def test_examples(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
