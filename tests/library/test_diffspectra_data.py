"""Line lists become the golden spectra, keep their strength, and make batches that depend on nothing but their keys."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.diffspectra.broadening import Augmentation, Broadening, broaden, network_input
from library.diffspectra.data import Collate, MoleculeData, load_molecules, read_lines, split_by_constitution
from library.diffspectra.lines import MODALITIES, POINTS, Lines, check_lines, chosen, grid
from library.diffspectra.molecules import ATOMIC_NUMBERS, Structure, batch_of, check_structure, pieces
from library.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden" / "diffspectra" / "broadened_examples.npz"
KEYS = torch.tensor([5, 2**62, 77])


@pytest.fixture(scope="module")
def data() -> MoleculeData:
    return load_molecules()


def lines(positions: list[float], strengths: list[float]) -> Lines:
    return Lines(torch.tensor(positions), torch.tensor(strengths))


@pytest.mark.parametrize("modality", MODALITIES)
def test_broadened_lines_are_the_golden_spectra(data: MoleculeData, modality: str) -> None:
    golden = np.load(GOLDEN)
    found = broaden([data.signals[modality](int(row)) for row in golden["row"]], modality)
    np.testing.assert_allclose(found.numpy(), golden[modality], rtol=1e-5)
    places = golden["uv_grid_eV" if modality == "uv" else "wavenumber_cm1"]
    np.testing.assert_allclose(grid(modality).numpy(), places, rtol=1e-6)


@pytest.mark.parametrize("shape", ["lorentzian", "gaussian"])
def test_a_band_holds_its_strength(shape: str) -> None:
    """All of a narrow Gaussian, and of a Lorentzian its share within the grid, which its integral gives."""
    width, middle = 0.2, 8.013
    found = broaden([lines([middle], [3.0])], "uv", Broadening(uv_width=width, uv_shape=shape))[0]
    share = 1.0
    if shape == "lorentzian":
        low, high = (2 * (edge - middle) / width for edge in (0.99, 15.01))
        share = (np.arctan(high) - np.arctan(low)) / np.pi
    assert float(found.double().sum()) * 0.02 == pytest.approx(3.0 * share, rel=1e-5)
    peak = 2 / (np.pi * width) if shape == "lorentzian" else 2 * np.sqrt(np.log(2) / np.pi) / width
    on_point = broaden([lines([8.0], [3.0])], "uv", Broadening(uv_width=width, uv_shape=shape))[0]
    assert float(on_point.max()) == pytest.approx(3 * peak, rel=1e-5)
    assert float(on_point[350 + 5]) == pytest.approx(1.5 * peak, rel=1e-5)  # half of it at half the width


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(600, 3900), st.floats(0.1, 50)), min_size=2, max_size=8), st.floats(0.1, 10))
def test_spectra_are_linear_in_the_lines(found: list[tuple[float, float]], factor: float) -> None:
    positions, strengths = (torch.tensor(part, dtype=torch.float32) for part in zip(*found, strict=True))
    whole = broaden([Lines(positions, factor * strengths)], "ir")
    parts = broaden([Lines(positions[i : i + 1], strengths[i : i + 1]) for i in range(len(positions))], "ir")
    torch.testing.assert_close(whole[0], factor * parts.sum(0), rtol=2e-5, atol=1e-6)


def test_narrow_lines_put_their_strength_into_the_right_bin() -> None:
    found = broaden([lines([1234.0, -15.0], [7.0, 9.0])], "raman", Broadening(raman_width=0.01))[0]
    assert int(found.argmax()) == 734
    assert float(found[734] / found.sum()) > 0.9999
    assert float(found[734]) == pytest.approx(7 * 2 / (np.pi * 0.01), rel=1e-5)


def test_molecules_of_a_batch_do_not_change_each_other(data: MoleculeData) -> None:
    some = [data.signals["uv"](i) for i in (0, 400, 1200)]
    together = broaden(some, "uv", width_factor=torch.tensor([1.0, 2.0, 0.5]), shift=torch.tensor([0.0, 0.1, -0.1]))
    alone = broaden(some[1:2], "uv", width_factor=torch.tensor([2.0]), shift=torch.tensor([0.1]))
    torch.testing.assert_close(together[1], alone[0], rtol=1e-6, atol=1e-7)


def test_scattered_intensities_follow_the_formula() -> None:
    """Against the exact ratio of two lines, at 1000 cm-1, where the factor is one, and at 3000 cm-1."""
    pair = [lines([1000.0], [1.0]), lines([3000.0], [1.0])]
    activity, intensity = (broaden(pair, "raman", Broadening(raman=kind)) for kind in ("activity", "intensity"))
    ratio = intensity.amax(1) / activity.amax(1)

    def factor(nu: float) -> float:
        return (1e7 / 532 - nu) ** 4 / nu / (1 - np.exp(-1.438776877 * nu / 298))

    assert float(ratio[0]) == pytest.approx(1, rel=1e-5)
    assert float(ratio[1]) == pytest.approx(factor(3000) / factor(1000), rel=1e-5)
    many, places = [lines([700.0, 3100.0], [5.0, 1.0])], grid("raman").double().numpy()
    moved = {"scale": torch.tensor([1.01]), "shift": torch.tensor([4.0])}
    activity, intensity = (
        broaden(many, "raman", Broadening(raman=kind, frequency_scale=0.965), **moved)[0].double().numpy()
        for kind in ("activity", "intensity")
    )
    np.testing.assert_allclose(intensity, activity * factor(places) / factor(1000), rtol=1e-6)


def test_molecules_without_lines_have_spectra_of_zeros() -> None:
    nothing = lines([], [])
    assert not broaden([nothing, nothing], "ir").any()
    assert not broaden([nothing, lines([1000.0], [1.0])], "ir")[0].any()


def test_frequency_scale_moves_vibrations_and_not_excitations() -> None:
    scaled = Broadening(frequency_scale=0.965)
    assert int(broaden([lines([2000.0], [1.0])], "ir", scaled).argmax()) == 1930 - 500
    assert int(broaden([lines([8.0], [1.0])], "uv", scaled).argmax()) == 350


def test_the_shipped_molecules_are_what_physics_says(data: MoleculeData) -> None:
    """As many modes as 3 n - 6, or 5 on a line; UV-Vis strength within the number of electrons; mutual exclusion."""
    for index in range(0, len(data), 7):
        structure = data.atoms.structure(index)
        centred = structure.positions.double() - structure.positions.double().mean(0)
        linear = bool(torch.linalg.matrix_rank(centred, tol=1e-2) == 1)
        assert len(data.signals["ir"](index).positions) == 3 * len(structure) - (5 if linear else 6)
        electrons = int(torch.tensor(ATOMIC_NUMBERS)[structure.types].sum() - structure.charges.sum())
        assert 0 < float(data.signals["uv"](index).strengths.sum()) <= electrons
    acetylene = data.smiles.index("C#C")
    infrared, raman = (data.signals[name](acetylene).strengths for name in ("ir", "raman"))
    assert float((infrared / infrared.max() * raman / raman.max()).max()) < 1e-4
    assert float(infrared.max()) > 1
    assert float(raman.max()) > 1


def test_parts_share_no_constitution(data: MoleculeData) -> None:
    found = {name: {data.smiles[i] for i in part.tolist()} for name, part in data.parts.items()}
    assert {name: len(part) for name, part in found.items()} == {"train": 1069, "validation": 133, "test": 133}
    assert len(set.union(*found.values())) == 1335 == len(data)
    for index in range(0, len(data), 50):
        check_structure(data.atoms.structure(index))


def test_batches_pad_with_zeros_and_unpad_again(data: MoleculeData) -> None:
    samples = data.part("train")
    chosen_samples = [samples[i] for i in (0, 500, 1000)]
    batch = Collate()(chosen_samples, KEYS)
    sizes = [len(sample.structure) for sample in chosen_samples]
    assert batch.counts.tolist() == sizes
    assert batch.edge_mask.sum((1, 2)).tolist() == [n * (n - 1) for n in sizes]
    assert {name: tuple(x.shape) for name, x in batch.spectra.items()} == {m: (3, POINTS[m]) for m in MODALITIES}
    outside = ~batch.node_mask
    assert not batch.positions[outside].any()
    assert not batch.types[outside].any()
    assert not batch.bonds[~batch.edge_mask].any()
    for sample, structure in zip(chosen_samples, batch.structures(), strict=True):
        for name in ("positions", "types", "charges", "bonds"):
            assert torch.equal(getattr(sample.structure, name), getattr(structure, name))
    assert batch.index.tolist() == [int(samples.numbers[i]) for i in (0, 500, 1000)]
    assert torch.equal(batch.keys, KEYS)


@pytest.mark.parametrize("width", [1, 4, 100])
def test_buckets_are_all_molecules_once_by_size(data: MoleculeData, width: int) -> None:
    samples = data.part("test")
    batch = Collate(modalities=("uv",))([samples[i] for i in range(40)], torch.arange(40))
    found = batch.buckets(width)
    assert sorted(torch.cat([places for places, _ in found]).tolist()) == list(range(40))
    for places, bucket in found:
        assert int(bucket.counts.max()) == bucket.positions.shape[1]
        assert int(bucket.counts.max() - bucket.counts.min()) < width
        assert torch.equal(bucket.spectra["uv"], batch.spectra["uv"][places])
        assert torch.equal(bucket.keys, places)


def test_perturbations_depend_on_the_key_alone(data: MoleculeData) -> None:
    samples = data.part("train", perturbed=True)
    collate = Collate(augmentation=Augmentation())
    three = collate([samples[i] for i in (3, 4, 5)], KEYS)
    alone = collate([samples[4]], KEYS[1:2])
    again = collate([samples[i] for i in (3, 4, 5)], KEYS + 1)
    clean = Collate()([samples[i] for i in (3, 4, 5)], KEYS)
    for modality in MODALITIES:
        torch.testing.assert_close(three.spectra[modality][1], alone.spectra[modality][0], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(three.spectra[modality], again.spectra[modality], atol=1e-3)
        assert bool((three.spectra[modality] >= 0).all())
        correlation = torch.corrcoef(torch.stack([three.spectra[modality][0], clean.spectra[modality][0]]))[0, 1]
        assert float(correlation) > 0.5
    plain = collate([data.part("train")[i] for i in (3, 4, 5)], KEYS)
    assert all(torch.equal(plain.spectra[m], clean.spectra[m]) for m in MODALITIES)


def test_no_perturbation_is_none(data: MoleculeData) -> None:
    nothing = Augmentation(width=(1, 1), frequency_scale=(1, 1), shift=0, noise=0)
    samples = data.part("train", perturbed=True)
    found = Collate(augmentation=nothing)([samples[0], samples[9]], KEYS[:2])
    clean = Collate()([samples[0], samples[9]], KEYS[:2])
    assert all(torch.equal(found.spectra[m], clean.spectra[m]) for m in MODALITIES)


def test_limits_keep_small_molecules_and_chosen_spectra(data: MoleculeData) -> None:
    small = data.limited(most_atoms=9, modalities=("raman", "uv"))
    assert list(small.signals) == ["uv", "raman"]
    assert all(int(small.part(name).sizes.max()) <= 9 for name in small.parts)
    assert small.fingerprint != data.fingerprint
    with pytest.raises(InputError, match="at most 2 atoms"):
        data.limited(most_atoms=2)
    with pytest.raises(InputError, match="has no part 'tests'; it has train, validation, test"):
        data.part("tests")
    with pytest.raises(InputError, match="has no ir spectra; it has uv, raman"):
        small.limited(modalities=("ir",))


def test_splits_keep_equal_constitutions_together() -> None:
    smiles = [f"C{i // 3}" for i in range(300)]
    parts = split_by_constitution(smiles, (0.8, 0.1, 0.1), seed=3)
    found = {name: {smiles[i] for i in part.tolist()} for name, part in parts.items()}
    assert {name: len(part) for name, part in found.items()} == {"train": 80, "validation": 10, "test": 10}
    assert len(set.union(*found.values())) == 100
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(300))
    with pytest.raises(InputError, match="2 constitutions are too few"):
        split_by_constitution(["C", "N"], (0.8, 0.1, 0.1))
    with pytest.raises(InputError, match="sum to 1"):
        split_by_constitution(smiles, (0.8, 0.1, 0.2))


METHANE = Structure(torch.zeros(5, 3), torch.tensor([1, 0, 0, 0, 0]), torch.zeros(5).long(), torch.zeros(5, 5).long())
BONDS = METHANE.bonds.index_put((torch.zeros(4).long(), torch.arange(1, 5)), torch.tensor(1))
BONDS = BONDS + BONDS.T


def changed(**parts: torch.Tensor) -> Structure:
    return Structure(**({"bonds": BONDS} | {k: v for k, v in vars(METHANE).items() if k != "bonds"} | parts))


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (changed(bonds=METHANE.bonds), "falls into 5 parts"),
        (changed(bonds=torch.triu(BONDS)), "symmetric"),
        (changed(bonds=4 * BONDS), "bond orders must be 0 to 3"),
        (changed(bonds=BONDS + torch.eye(5).long()), "zeros on the diagonal"),
        (changed(types=METHANE.types + 5), "places in H, C, N, O, F"),
        (changed(charges=METHANE.charges + 2), "formal charges of -1 to 1"),
        (changed(positions=METHANE.positions / 0), "not finite"),
        (changed(positions=METHANE.positions[1:]), r"need positions \(5, 3\)"),
        (Structure(*(torch.zeros(0).long() for _ in range(4))), "0 atoms; 1 to 29"),
        (Structure(torch.zeros(30, 3), *(torch.zeros(30).long() for _ in range(3))), "30 atoms; 1 to 29"),
    ],
)
def test_molecules_that_cannot_be_represented_are_refused(structure: Structure, message: str) -> None:
    with pytest.raises(InputError, match=f"^mine: .*{message}"):
        check_structure(structure, "mine")


def test_pieces_of_chains() -> None:
    chain = torch.diag(torch.ones(28).long(), 1)
    assert pieces(chain + chain.T) == 1
    chain[10, 11] = 0
    assert pieces(chain + chain.T) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: batch_of([], {}), "at least one molecule"),
        (lambda: batch_of([METHANE], {"ir": torch.zeros(2, 3501)}), "1 molecules have 2 ir spectra"),
        (lambda: Collate()([], torch.zeros(0)), "at least one molecule"),
        (lambda: batch_of([METHANE], {}).buckets(0), "at least 1"),
        (lambda: broaden([], "ir"), "no ir lines"),
        (lambda: broaden([lines([1.0], [1.0])], "nmr"), "no modality 'nmr'"),
        (lambda: broaden([lines([float("nan")], [1.0])], "ir"), "a ir line is not finite"),
        (lambda: broaden([lines([1.0], [float("inf")])], "uv"), "a uv line is not finite"),
        (lambda: grid("nmr"), "no modality 'nmr'; there are uv, ir, raman"),
        (lambda: chosen(()), "no modality was chosen"),
        (lambda: network_input(torch.tensor([[1.0, -0.5]])), "negative intensity -0.5"),
        (lambda: network_input(torch.tensor([[1.0, float("nan")]])), "not finite"),
        (lambda: check_lines(lines([1.0], [-1.0]), "ir"), "negative"),
        (lambda: check_lines(lines([float("inf")], [1.0]), "ir"), "not finite"),
        (lambda: check_lines(lines([1.0, 2.0], [1.0]), "ir"), "strengths"),
        (lambda: check_lines(lines([-3.0], [1.0]), "ir"), "no ir line has a positive position and strength"),
        (lambda: Augmentation(width=(2, 1)), "above"),
        (lambda: load_molecules("nowhere"), "no molecules at 'nowhere'"),
    ],
)
def test_bad_input_is_one_clear_line(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def changed_at(content: dict[str, np.ndarray], key: str, value: object) -> dict[str, np.ndarray]:
    """The arrays with another second row of one of them."""
    array = content[key].astype(np.int64) if content[key].dtype.kind == "i" else content[key].copy()
    array[1] = value
    return content | {key: array}


def without_bond(content: dict[str, np.ndarray], molecule: int) -> dict[str, np.ndarray]:
    """The arrays without the first bond of a molecule."""
    ends = content["bond_offset"].copy()
    ends[molecule + 1 :] -= 1
    return content | {"bond_offset": ends, "bonds": np.delete(content["bonds"], ends[molecule], 0)}


def test_files_of_lines_are_checked(data: MoleculeData, tmp_path: Path) -> None:
    from library.samples import sample_file

    with sample_file("diffspectra", "simulated_gfn2_lines.npz").open("rb") as stream, np.load(stream) as arrays:
        content = dict(arrays)
    middle = 500
    changes = {
        "has no array 'raman'": {k: v for k, v in content.items() if k != "raman"},
        "atomic number 14 is none": content | {"z": np.where(content["z"] == 6, 14, content["z"])},
        "mode_offset does not cut the 45803 rows of 'freq'": content | {"freq": content["freq"][1:]},
        "mode_offset does not cut the 45803 rows of 'ir'": content | {"ir": content["ir"][1:]},
        "rows of 'pos' into": content | {"pos": content["pos"][1:]},
        "rows of 'formal_charge' into": content | {"formal_charge": content["formal_charge"][1:]},
        r"pos is float32 \(17936, 2\); it must hold numbers, \(rows, 3\)": content | {"pos": content["pos"][:, 1:]},
        "atom_offset is float32": content | {"atom_offset": content["atom_offset"].astype(np.float32)},
        "have 5 entries of 'split'": content | {"split": content["split"][:5]},
        "split must be 0, 1 or 2": changed_at(content, "split", 9),
        "atomic number 262 is none": changed_at(content, "z", 262),
        "formal charges of -1 to 1": changed_at(content, "formal_charge", 3),
        "a position is not finite": changed_at(content, "pos", np.nan),
        "atom that is not there": changed_at(content, "bonds", [0, 120, 1]),
        "bonded to itself": changed_at(content, "bonds", [1, 1, 1]),
        "orders must be 1 to 3": changed_at(content, "bonds", [0, 1, 7]),
        "orders must be 1 to 3, kekulized": changed_at(content, "bonds", [0, 1, -1]),
        "listed twice": changed_at(content, "bonds", content["bonds"][0][[1, 0, 2]]),
        f"into one part .molecule {middle}": without_bond(content, middle),
        "freq is not finite": changed_at(content, "freq", np.nan),
        "ir is negative or not finite": changed_at(content, "ir", -1.0),
        "uv_strength is negative or not finite": changed_at(content, "uv_strength", np.inf),
        "holds no molecules": {k: v[:1] if k.endswith("offset") else v[:0] for k, v in content.items()},
    }
    for place, (message, arrays) in enumerate(changes.items()):
        np.savez(tmp_path / f"{place}.npz", **arrays)
        with pytest.raises(InputError, match=message):
            load_molecules(str(tmp_path / f"{place}.npz"))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "0.npz").read_bytes()[:1000])
    with pytest.raises(InputError, match=r"cut.npz is no NPZ file"):
        load_molecules(str(tmp_path / "cut.npz"))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(InputError, match=r"text.npz is no NPZ file"):
        load_molecules(str(tmp_path / "text.npz"))
    np.savez(tmp_path / "same.npz", **content)
    with (tmp_path / "same.npz").open("rb") as stream:
        assert read_lines(stream, "same").fingerprint == data.fingerprint
