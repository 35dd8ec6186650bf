"""SpecFormer and the denoiser equal the released ones, and have the symmetries that they must have."""

import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from library.diffspectra.attention import Block
from library.diffspectra.conditioned import Conditioned
from library.diffspectra.denoiser import Denoiser, DenoiserSettings
from library.diffspectra.geometry_encoder import GeometryEncoder, GeometrySettings
from library.diffspectra.released import load_released, load_released_block, load_released_encoder
from library.diffspectra.scaling import State, pair_mask
from library.diffspectra.specformer import SpecFormer, SpecFormerSettings
from library.errors import ArtifactError, InputError, NonFiniteError
from tests.library.diffspectra_cases import (
    CLOSE,
    PATCHES,
    golden,
    golden_network,
    masks,
    random_state,
    released,
    spectra,
)

SMALL = DenoiserSettings(width=24, pair_width=6, heads=4, blocks=2, condition=16)


def lively(settings: DenoiserSettings = SMALL) -> Denoiser:
    """A random denoiser in evaluation whose coordinate updates are not tiny."""
    torch.manual_seed(0)
    net = Denoiser(settings).eval()
    for name, parameter in net.named_parameters():
        if name.endswith("kappa"):
            torch.nn.init.constant_(parameter, 0.5)
        if name.endswith("coordinates.weight.weight"):
            torch.nn.init.xavier_uniform_(parameter)
    return net


def turned(state: State, rotation: Tensor) -> State:
    return State(torch.cat([state.positions @ rotation.T, state.features], -1), state.edges)


def permuted(state: State, order: Tensor) -> State:
    return State(state.nodes[:, order], state.edges[:, order][:, :, order])


def close(a: State, b: State, tolerance: float = 1e-5) -> bool:
    return all(torch.allclose(x, y, rtol=0, atol=tolerance) for x, y in zip(a, b, strict=True))


def test_the_encoder_equals_the_released_one_in_evaluation_and_in_training():
    arrays = golden("specformer")
    encoder = SpecFormer(SpecFormerSettings(**PATCHES, width=16, heads=4, layers=2, features=24)).eval()
    load_released_encoder(encoder, released(arrays))
    seen = spectra(arrays)
    torch.testing.assert_close(encoder.tokens(encoder.split(seen)), arrays["tokens_eval"], **CLOSE)
    torch.testing.assert_close(encoder(seen), arrays["out_eval"], **CLOSE)
    torch.testing.assert_close(encoder.train()(seen), arrays["out_train"], **CLOSE)


def test_the_encoder_of_one_spectrum_equals_the_released_one():
    arrays = golden("specformer_single")
    settings = SpecFormerSettings(modalities=("ir",), **PATCHES, width=8, heads=2, layers=2, features=12)
    encoder = SpecFormer(settings).eval()
    load_released_encoder(encoder, released(arrays))
    torch.testing.assert_close(encoder({"ir": arrays["x"]}), arrays["out_eval"], **CLOSE)


def test_a_block_equals_the_released_one_on_pairs_that_differ_by_direction():
    arrays = golden("block")
    block = Block(24, 8, 6, 16, 0.0).eval()
    load_released_block(block, released(arrays))
    size = int(arrays["N"])
    source, target = arrays["edge_index"]
    place = (target // size, target % size, source % size)
    mask = arrays["node_mask"].view(3, size) > 0

    def dense(values: Tensor) -> Tensor:
        out = torch.zeros(3, size, size, values.shape[1])
        out[place] = values
        return out

    nodes, pairs, positions = block(
        arrays["h"].view(3, size, -1),
        dense(arrays["edge_attr"]),
        arrays["pos"].view(3, size, 3),
        dense(arrays["extra_adj"]) > 0,
        mask,
        pair_mask(mask),
        F.silu(arrays["cond"]),
    )
    torch.testing.assert_close(nodes.flatten(0, 1), arrays["h_out"], **CLOSE)
    torch.testing.assert_close(pairs[place], arrays["edge_out"], **CLOSE)
    torch.testing.assert_close(positions.flatten(0, 1), arrays["pos_out"], **CLOSE)


@pytest.mark.parametrize("conditioned", [False, True])
def test_the_denoiser_equals_the_released_one(conditioned):
    arrays, network = golden("dmt_forward"), golden_network()
    previous = State(arrays["cond_x"], arrays["cond_edge_x"]) if conditioned else None
    noisy, mask = State(arrays["z"], arrays["edge_z"]), arrays["node_mask"][..., 0] > 0
    name = "cond" if conditioned else "nocond"
    found = network(noisy, arrays["noise_level"], spectra(arrays), mask, previous)
    torch.testing.assert_close(found.nodes, arrays[f"out_{name}"], **CLOSE)
    torch.testing.assert_close(found.edges, arrays[f"edge_out_{name}"], **CLOSE)
    torch.testing.assert_close(network.denoiser.level(arrays["noise_level"]), arrays["time_emb"], **CLOSE)
    torch.testing.assert_close(network.encode(spectra(arrays))[0], arrays["spec_emb"], **CLOSE)


def test_a_released_state_of_other_sizes_is_refused_and_changes_nothing():
    network = Conditioned(SpecFormerSettings(**PATCHES, width=8, heads=2, features=24), SMALL)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ArtifactError, match="the released state is of another model"):
        load_released(network, released(golden("dmt_forward")))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("modalities", "mebibytes"),
    [(("uv", "ir", "raman"), 151.18), (("ir",), 125.04), (("raman",), 125.04), (("uv",), 116.24)],
)
def test_published_sizes_have_the_published_numbers_of_parameters(modalities, mebibytes):
    network = Conditioned(SpecFormerSettings.paper(modalities), DenoiserSettings.paper())
    scales = 3  # constants of the encoder's three layers that the released code counts as parameters
    total, encoder = (sum(p.numel() for p in part.parameters()) + scales for part in (network, network.encoder))
    assert round(4 * total / 2**20, 2) == mebibytes
    if len(modalities) == 3:
        assert (total, encoder) == (39_630_619, 11_828_867)
        readme = Path(inspect.getfile(Conditioned)).with_name("README.md").read_text(encoding="utf-8")
        assert f"({total - scales:,} weights".replace(",", " ") in readme
    absent = {"uv", "ir", "raman"} - set(modalities)
    assert not [name for name, _ in network.named_parameters() if absent & set(name.split("."))]


def test_patches_of_the_published_encoder():
    settings = SpecFormerSettings.paper()
    assert [settings.patches(m) for m in settings.modalities] == [69, 139, 139]


def test_spectra_do_not_influence_each_other_where_attention_across_them_is_off():
    settings = SpecFormerSettings(**PATCHES, width=8, heads=2, layers=2, features=8, across=False)
    torch.manual_seed(0)
    encoder = SpecFormer(settings).eval()
    seen = {"uv": torch.rand(2, 701), "ir": torch.rand(2, 3501), "raman": torch.rand(2, 3501)}
    other = seen | {"ir": torch.rand(2, 3501)}
    a, b = (encoder.tokens(encoder.split(one)) for one in (seen, other))
    uv, ir, _ = (settings.patches(m) for m in settings.modalities)
    assert torch.equal(a[:, :uv], b[:, :uv])
    assert torch.equal(a[:, uv + ir :], b[:, uv + ir :])
    assert not torch.allclose(a[:, uv : uv + ir], b[:, uv : uv + ir])


def test_a_spectrum_that_is_absent_counts_for_nothing():
    torch.manual_seed(0)
    encoder = SpecFormer(SpecFormerSettings(**PATCHES, width=8, heads=2, features=8, absent=True)).eval()
    seen = {"uv": torch.rand(2, 701), "ir": torch.rand(2, 3501), "raman": torch.rand(2, 3501)}
    present = torch.tensor([[True, False, True], [True, True, True]])
    a, b = (encoder(one, present) for one in (seen, seen | {"ir": torch.rand(2, 3501)}))
    assert torch.equal(a[0], b[0])
    assert not torch.allclose(a[1], b[1])


def test_spectra_that_do_not_fit_are_refused():
    encoder = SpecFormer(SpecFormerSettings(modalities=("uv", "ir"), **PATCHES, width=8, heads=2, features=8))
    good = {"uv": torch.zeros(2, 701), "ir": torch.zeros(2, 3501)}
    for bad, message in (
        ({"uv": good["uv"]}, "the ir spectrum is missing"),
        (good | {"ir": torch.zeros(2, 3500)}, "must be \\(molecules, 3501\\)"),
        (good | {"uv": torch.full((2, 701), float("nan"))}, "not finite"),
        (good | {"uv": torch.zeros(3, 701)}, "3 \\(uv\\), 2 \\(ir\\)"),
        ({name: one[:0] for name, one in good.items()}, "at least one molecule"),
        ({name: one[:1] for name, one in good.items()}, "at least 2 molecules"),
    ):
        with pytest.raises(InputError, match=message):
            encoder(bad)
    with pytest.raises(InputError, match="has not learnt to do without"):
        encoder(good, torch.ones(2, 2, dtype=torch.bool))


def test_rotations_and_reflections_turn_the_coordinates_and_nothing_else():
    arrays, network = golden("dmt_forward"), golden_network()
    noisy, previous = State(arrays["z"], arrays["edge_z"]), State(arrays["cond_x"], arrays["cond_edge_x"])
    mask, level, seen = arrays["node_mask"][..., 0] > 0, arrays["noise_level"], spectra(arrays)
    found = network(noisy, level, seen, mask, previous)
    for rotation in (arrays["rotation"], -torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, -1.0]))):
        moved = network(turned(noisy, rotation), level, seen, mask, turned(previous, rotation))
        assert close(moved, turned(found, rotation), 1e-4)


def test_permutations_permute_padding_and_other_molecules_change_nothing():
    net, mask = lively(), masks(6, 6)
    noisy, previous = random_state(mask), random_state(mask, 1)
    level, condition = torch.tensor([0.5, -2.0]), torch.randn(2, 16)
    found = net(noisy, level, condition, mask, previous)
    assert (found.positions - noisy.positions).abs().max() > 0.05, "coordinates move"

    order = torch.tensor([3, 1, 5, 0, 2, 4])
    moved = net(permuted(noisy, order), level, condition, mask, permuted(previous, order))
    assert close(moved, permuted(found, order))

    def padded(state: State) -> State:
        return State(F.pad(state.nodes, (0, 0, 0, 3)), F.pad(state.edges, (0, 0, 0, 3, 0, 3)))

    wide = net(padded(noisy), level, condition, F.pad(mask, (0, 3)), padded(previous))
    assert close(wide, padded(found))

    alone = net(noisy.at(slice(1)), level[:1], condition[:1], mask[:1], previous.at(slice(1)))
    assert close(alone, found.at(slice(1)))


def test_outputs_are_symmetric_centred_and_zero_where_there_is_nothing():
    mask = masks(1, 2, 5)
    for settings in (SMALL, SMALL.model_copy(update={"equivariant": False})):
        noisy = random_state(mask)
        found = lively(settings)(noisy, torch.zeros(3), torch.randn(3, 16), mask, random_state(mask, 1))
        assert torch.equal(found.edges, found.edges.transpose(1, 2))
        assert not found.edges[~pair_mask(mask)].any()
        assert not found.nodes[~mask].any()
        assert found.positions.sum(1).abs().max() < 1e-5
        assert torch.isfinite(found.nodes).all(), "one atom alone, too"


def test_the_network_without_equivariance_sees_how_a_molecule_lies():
    net, mask = lively(SMALL.model_copy(update={"equivariant": False})), masks(5)
    noisy, swap = random_state(mask), torch.eye(3)[[1, 2, 0]]
    told = (torch.zeros(1), torch.zeros(1, 16), mask)
    assert not close(net(turned(noisy, swap), *told), turned(net(noisy, *told), swap), 1e-2)


def test_coordinates_that_are_not_finite_are_refused():
    mask = masks(3)
    noisy = random_state(mask)
    noisy.nodes[0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="not finite"):
        lively()(noisy, torch.zeros(1), torch.zeros(1, 16), mask)


def test_geometries_are_encoded_invariantly_and_pointed_at_equivariantly():
    torch.manual_seed(0)
    net, mask = GeometryEncoder(GeometrySettings(), 8).double(), masks(6, 4)
    positions = torch.randn(2, 6, 3, dtype=torch.float64) * mask[..., None]
    types = torch.randint(5, (2, 6)) * mask
    features, arrows = net(positions, types, mask)
    rotation = -torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    moved, turned_arrows = net(positions @ rotation.T + 1.0, types, mask)
    torch.testing.assert_close(moved, features)
    torch.testing.assert_close(turned_arrows, arrows @ rotation.T)
    assert arrows[mask].norm(dim=-1).min() > 1e-4
    assert not arrows[~mask].any()
