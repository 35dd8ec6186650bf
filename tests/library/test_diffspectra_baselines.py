"""Retrieval finds what it knows, the ridge is ridge regression, and both read structure off spectra."""

import pytest
import torch
from sklearn.linear_model import Ridge

from library.diffspectra import baselines
from library.diffspectra.baselines import features, kernel_ridge, nearest, properties
from library.diffspectra.data import MoleculeData, load_molecules
from library.errors import InputError


@pytest.fixture(scope="module")
def data() -> MoleculeData:
    return load_molecules()


@pytest.fixture(scope="module")
def parts(data: MoleculeData) -> dict[str, torch.Tensor]:
    return {"train": data.parts["train"][::4], "validation": data.parts["validation"], "test": data.parts["test"]}


def test_known_molecules_are_their_own_nearest(data: MoleculeData, parts) -> None:
    known = features(data, parts["test"], ("ir", "raman"))
    place, cosine = nearest(known, known.flip(0))
    assert torch.equal(place, torch.arange(len(known)).flip(0))
    torch.testing.assert_close(cosine, torch.ones(len(known)).double())


def test_only_allowed_molecules_answer(data: MoleculeData, parts) -> None:
    known, asked = (features(data, parts[name], ("raman",)) for name in ("train", "test"))
    sizes = [data.sizes[parts[name]] for name in ("train", "test")]
    allowed = sizes[1][:, None] == sizes[0]
    place, cosine = nearest(known, asked, allowed)
    answered = cosine > -torch.inf
    assert torch.equal(answered, allowed.any(1))
    assert torch.equal(sizes[0][place[answered]], sizes[1][answered])
    assert not nearest(known, asked[:2], torch.zeros(2, len(known), dtype=torch.bool))[1].isfinite().any()


def test_features_do_not_depend_on_who_else_is_asked(data: MoleculeData, parts) -> None:
    some = parts["test"][:5]
    whole = features(data, some, ("uv", "ir"))
    assert whole.shape == (5, 140 + 700)
    torch.testing.assert_close(features(data, some[3:4], ("ir", "uv")), whole[3:4])
    assert float(whole.min()) >= 0


def test_properties_are_those_of_the_smiles(data: MoleculeData) -> None:
    numbers = torch.tensor([data.smiles.index(smiles) for smiles in ("C#C", "CCO", "CC#N")])
    found = properties(data, numbers)
    assert found.names == ("alcohol", "alkane", "alkyne", "nitrile")
    assert found.groups.int().tolist() == [[0, 0, 1, 0], [1, 1, 0, 0], [0, 1, 0, 1]]
    assert found.counts.tolist() == [[2, 2, 0, 0, 0], [6, 2, 0, 1, 0], [3, 2, 1, 0, 0]]


def test_the_ridge_is_that_of_scikit_learn(data: MoleculeData, parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "RIDGES", (1.0,))
    found = kernel_ridge(data, ("raman",), parts=parts)
    inputs = {name: features(data, part, ("raman",)) for name, part in parts.items()}
    mean, deviation = inputs["train"].mean(0), inputs["train"].std(0).clamp(min=1e-8)
    scaled = {name: ((x - mean) / deviation / x.shape[1] ** 0.5).numpy() for name, x in inputs.items()}
    counts = {name: properties(data, part).counts[:, :4].numpy() for name, part in parts.items()}
    learned = counts["train"].mean(0)  # features are centred, so that the intercept is the mean
    model = Ridge(alpha=1.0, fit_intercept=False).fit(scaled["train"], counts["train"] - learned)
    guess = model.predict(scaled["test"]) + learned
    assert found.composition == pytest.approx(float((guess.round() == counts["test"]).all(1).mean()))


def test_several_spectra_tell_more_than_one(data: MoleculeData, parts) -> None:
    ultraviolet, infrared, everything = (
        kernel_ridge(data, modalities, parts=parts) for modalities in (("uv",), ("ir",), ("uv", "ir", "raman"))
    )
    assert 0.5 < ultraviolet.auc < infrared.auc < everything.auc <= 1
    assert ultraviolet.composition < everything.composition
    assert everything.atoms > 1 / 10


def test_bad_input_is_one_clear_line(data: MoleculeData, parts) -> None:
    with pytest.raises(InputError, match="has no uv spectra; it has ir"):
        features(data.limited(modalities=("ir",)), parts["test"], ("uv",))
    with pytest.raises(InputError, match="cannot be looked up among"):
        nearest(torch.zeros(3, 4), torch.zeros(1, 5))
