"""Any model, wherever its weights are, gives one row per layer; what cannot be analysed says so."""

import weakref
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from library import farms
from library.artifact import write_artifact
from library.errors import ArtifactError, InputError
from library.farms import analysis
from library.farms.analysis import Settings, measure
from library.farms.layers import find_layers
from library.farms.windows import window_grid, window_spectra
from library.spectral.marchenko_pastur import MarchenkoPastur
from library.spectral.tails import fit_tail, hill_scan, squared_singular_values

GOLDEN = Path(__file__).parents[1] / "golden" / "farms"


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=4))


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_published_rows_of_plain_and_windowed_layers():
    golden = np.load(GOLDEN / "alphas.npz")
    state = {f"layers.{i}.weight": torch.from_numpy(golden[f"W{i}"]) for i in range(5)}
    plain = farms.analyze(state, method="plain", rule="ks")
    assert plain["alpha"].to_numpy() == pytest.approx(golden["plain_ks_alpha"], abs=1e-3)
    assert plain["spectral_norm"].to_numpy() == pytest.approx(golden["plain_spectral_norm"], rel=1e-4)
    assert plain["norm"].to_numpy() == pytest.approx(golden["plain_sq_fro"], rel=1e-4)
    for setting, (rows, ratio, ops) in enumerate(golden["windows_rows_Q_ops"]):
        table = farms.analyze(state, window=int(rows), ratio=float(ratio), ops=int(ops))
        assert table["alpha"].to_numpy() == pytest.approx(golden[f"farms{setting}_median_alpha"], abs=2e-4)
        assert table["D"].to_numpy() == pytest.approx(golden[f"farms{setting}_median_D"], abs=5e-4)
        assert table["stable_rank"].to_numpy() == pytest.approx(golden[f"farms{setting}_stable_rank"], rel=1e-4)
        assert table["alpha_weighted"].to_numpy() == pytest.approx(golden[f"farms{setting}_alpha_hat"], abs=1e-3)


def test_published_rows_of_convolutions():
    golden = np.load(GOLDEN / "conv_alphas.npz")
    state = {f"{i}.weight": torch.from_numpy(golden[f"W{i}"]) for i in range(4)}
    for method, name in (("farms", "farms_Q1"), ("plain", "plain")):
        table = farms.analyze(state, method=method)
        expected = [golden[f"{name}_median_alpha_{i}"][0] for i in range(4)]
        assert table["alpha"].to_numpy() == pytest.approx(expected, abs=1e-3)
        assert (table["kind"] == "conv").all()
        assert table["slices"].tolist() == [9, 9, 1, 9]


def test_the_columns_are_what_they_are_called():
    weight = gaussian(60, 40).double()
    [row] = farms.analyze({"weight": weight}, method="plain").to_dict("records")
    values = squared_singular_values(weight)
    fit = fit_tail(values)
    shares = values / values.sum()
    assert row["alpha"] == pytest.approx(float(fit.alpha))
    assert row["standard_error"] == pytest.approx((row["alpha"] - 1) / row["tail"] ** 0.5)
    assert row["log_alpha_norm"] == pytest.approx(float(values.pow(fit.alpha).sum().log10()))
    assert row["entropy"] == pytest.approx(float(-(shares * shares.log()).sum() / np.log(40)))
    assert row["norm"] == pytest.approx(float(weight.square().sum()))
    assert row["mp_alpha"] == pytest.approx(MarchenkoPastur(40 / 60).hill_alpha())
    assert (row["num_evals"], row["tail"], row["zero_fraction"]) == (40, 20, 0)


def test_alpha_knows_neither_scale_nor_rotation_nor_plain_transposition():
    weight = gaussian(60, 40).double()
    left = torch.linalg.qr(gaussian(60, 60, seed=1).double()).Q
    forms = {"as.weight": weight, "scaled.weight": -3e3 * weight, "turned.weight": left @ weight, "t.weight": weight.T}
    alphas = farms.analyze(forms, method="plain")["alpha"]
    assert alphas.to_numpy() == pytest.approx(alphas[0], rel=1e-9)
    scaled = farms.analyze({k: forms[k] for k in ("as.weight", "scaled.weight", "t.weight")}, window=20)["alpha"]
    assert scaled.to_numpy() == pytest.approx(scaled[0], rel=1e-9)


def test_every_source_of_the_same_weights_gives_the_same_table(llama, tmp_path):
    expected = farms.analyze(llama, window=16, ops=3)
    assert expected["layer"].iloc[0] == "model.layers.0.self_attn.q_proj"
    assert expected["layer"].iloc[-1] == "lm_head"
    assert len(expected) == 2 * 7 + 1  # no embedding
    keys = expected.set_index("layer").loc["model.layers.1.self_attn.k_proj"]
    assert (keys["rows"], keys["columns"]) == (16, 32)  # grouped queries
    llama.save_pretrained(tmp_path / "folder", max_shard_size="40KB")
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
    save_file(llama.state_dict(), tmp_path / "one.safetensors")
    artifact = write_artifact(
        tmp_path / "artifact", kind="toy", recipe={}, weights=llama.state_dict(), metrics={}, data=""
    )
    sources = [llama.state_dict(), tmp_path / "folder", str(tmp_path / "one.safetensors"), artifact, artifact.path]
    for source in sources:
        found = farms.analyze(source, window=16, ops=3).set_index("layer").loc[expected["layer"]].reset_index()
        assert found.equals(expected)


def test_a_transposed_layout_is_turned_and_a_tied_weight_counted_once(gpt2, tmp_path):
    table = farms.analyze(gpt2, window=16, ops=3).set_index("layer")
    assert len(table) == 2 * 4 + 1  # the output layer is the embedding's own weight
    shapes = {name.split(".", 3)[-1]: (row["rows"], row["columns"]) for name, row in table.iterrows()}
    assert shapes["attn.c_attn"] == (96, 32)
    assert shapes["mlp.c_proj"] == (32, 128)
    gpt2.save_pretrained(tmp_path / "folder")
    for source in (tmp_path / "folder", gpt2.state_dict()):
        found = {layer.name: layer for layer in find_layers(source) if "lm_head" not in layer.name}
        for name, row in table.drop("lm_head").iterrows():
            assert found[name].shape == (row["rows"], row["columns"])
            module = gpt2.get_submodule(name)
            assert torch.equal(found[name].load(), module.weight.T)  # the square one too
    state = {"lm_head.weight": gpt2.lm_head.weight, "again.weight": gpt2.lm_head.weight}
    assert len(find_layers(state)) == 1


def test_experts_are_layers_of_their_own(tmp_path):
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
        )
    )
    names = {layer.name for layer in find_layers(model) if "experts" in layer.name}
    assert len(names) == 6
    save_file(model.state_dict(), tmp_path / "one.safetensors")
    for source in (model, model.state_dict(), tmp_path / "one.safetensors"):
        experts = {layer.name: layer for layer in find_layers(source) if "experts" in layer.name}
        assert experts.keys() == names
        stack = model.model.layers[0].mlp.experts.down_proj
        assert torch.equal(experts["model.layers.0.mlp.experts.down_proj[2]"].load(), stack[2])


def test_one_weight_is_in_memory_at_a_time(llama, tmp_path, monkeypatch):
    llama.save_pretrained(tmp_path)
    seen: list[weakref.ref] = []

    def watch(weight, settings):
        assert all(earlier() is None for earlier in seen)
        seen.append(weakref.ref(weight))
        return measure(weight, settings)

    monkeypatch.setattr(analysis, "measure", watch)
    assert len(farms.analyze(tmp_path, window=16, ops=3)) == len(seen) == 15


def test_the_standard_error_of_disjoint_windows_is_that_of_a_mean():
    weight = gaussian(120, 120).double()
    table = farms.analyze({"weight": weight}, window=30, step=30)
    spectra = window_spectra(weight, window_grid((120, 120), window=30, step=30))
    alphas = fit_tail(spectra).alpha
    assert table["windows"][0] == 16
    assert table["standard_error"][0] == pytest.approx(float(alphas.std(correction=0)) / 4, rel=1e-9)


def test_the_standard_error_is_about_the_deviation_between_matrices():
    tables = [farms.analyze({"weight": gaussian(96, 96, seed=seed)}, window=24, ops=7) for seed in range(40)]
    alphas = np.array([table["alpha"][0] for table in tables])
    errors = np.array([table["standard_error"][0] for table in tables])
    assert 0.5 < errors.mean() / alphas.std() < 2


def test_with_a_tolerance_there_are_no_more_windows_than_needed():
    weight = gaussian(200, 200)
    loose, exact = (measure(weight, Settings(window=50, ops=17, tolerance=t)) for t in (1.0, 1e-9))
    assert loose[0].grid.row_count == 3
    assert exact[0].grid.row_count > 3
    assert loose[2] <= 1.0


def test_pruned_weights_are_fitted_on_what_is_not_zero():
    weight = gaussian(64, 64)
    weight[40:] = 0
    [row] = farms.analyze({"weight": weight}, method="plain").to_dict("records")
    alone = farms.analyze({"weight": weight[:40]}, method="plain")
    assert row["zero_fraction"] == pytest.approx(24 / 64)
    assert row["alpha"] == pytest.approx(alone["alpha"][0], rel=1e-9)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(20, 20), "0 eigenvalues that are not zero; at least 5"),
        (gaussian(4, 30), "4 eigenvalues"),
        (torch.eye(20), "equal eigenvalues"),
    ],
)
def test_a_layer_without_a_tail_says_why_and_the_others_go_on(weight, reason):
    table = farms.analyze({"a.weight": weight, "b.weight": gaussian(20, 20)}, method="plain")
    assert reason in table["warning"][0]
    assert np.isnan(table["alpha"][0])
    assert table["warning"][1] == ""
    assert np.isfinite(table["alpha"][1])


def test_many_windows_need_no_matrix_of_their_overlaps(monkeypatch):
    weight = gaussian(60, 80).double()
    grid = window_grid((60, 80), window=20, ops=9)
    spectrum = analysis.Spectrum(window_spectra(weight, grid)[None], grid, (20, 20))
    fit = spectrum.fit(Settings())
    start = min(18, 20 - round(20 * float(fit.tail[0]) / spectrum.values.numel()))
    alphas = hill_scan(spectrum.values[0])[:, start]
    deviations = alphas - alphas.mean()
    expected = (deviations @ torch.kron(*grid.overlaps()) @ deviations).sqrt() / grid.count
    monkeypatch.setattr(torch, "kron", None)
    assert spectrum.standard_error(fit) == pytest.approx(float(expected), rel=1e-12)


def test_layers_whose_weights_have_other_names():
    attention = nn.MultiheadAttention(16, 2)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 9))
    for source in (attention, attention.state_dict()):
        found = {layer.name: layer for layer in find_layers(source)}
        assert found.keys() == {"in_proj_weight", "out_proj"}
        assert torch.equal(found["in_proj_weight"].load(), attention.in_proj_weight)
    assert [layer.name for layer in find_layers(normed)] == ["0", "1"]
    assert torch.equal(find_layers(normed)[0].load(), normed[0].weight)
    assert len(find_layers(nn.MultiheadAttention(16, 2, kdim=8, vdim=8))) == 4


def test_modules_are_listed_in_their_order_and_states_by_name():
    model = nn.Sequential(OrderedDict(stem=nn.Linear(9, 9), body=nn.Linear(9, 9)))
    assert [layer.name for layer in find_layers(model)] == ["stem", "body"]
    assert [layer.name for layer in find_layers(model.state_dict())] == ["body", "stem"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: farms.analyze(torch.ones(9, 9)), "not a Tensor; give a single weight as"),
        (lambda: farms.analyze(np.ones((9, 9))), "not a ndarray"),
        (lambda: farms.analyze(None), "not a NoneType"),
        (lambda: farms.analyze([nn.Linear(9, 9)]), "not a list"),
        (lambda: farms.analyze({"model": {"a.weight": torch.ones(9, 9)}, "epoch": 3}), "give what is under 'model'"),
        (lambda: farms.analyze({"a.weight": np.ones((9, 9))}), "'a.weight' is a ndarray; give torch tensors"),
        (lambda: farms.analyze(nn.Linear(9, 9), {"window": 8}), "settings must be Settings, got dict"),
        (lambda: farms.analyze(nn.Linear(9, 9, device="meta")), "is on the meta device"),
        (lambda: farms.analyze(nn.Linear(9, 9), ratio=float("inf")), "ratio: Input should be a finite number"),
    ],
)
def test_what_is_no_model_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_what_cannot_be_read_is_refused(tmp_path):
    broken = gaussian(20, 20)
    broken[3, 4] = torch.nan
    with pytest.raises(InputError, match="layer second: 1 of 400 weights are not finite"):
        farms.analyze({"first.weight": gaussian(20, 20), "second.weight": broken})
    with pytest.raises(InputError, match=r"layer a is quantised \(torch.int8\)"):
        farms.analyze({"a.weight": torch.zeros(20, 20, dtype=torch.int8)})
    with pytest.raises(InputError, match=r"a\.qweight holds packed integers"):
        farms.analyze({"a.qweight": torch.zeros(20, 20, dtype=torch.int32)})
    with pytest.raises(InputError, match="no linear or convolutional layer"):
        farms.analyze(nn.LayerNorm(4))
    with pytest.raises(InputError, match="window: Input should be greater than or equal to 8"):
        farms.analyze({"weight": gaussian(20, 20)}, window=4)
    with pytest.raises(InputError, match="ratio: Input should be greater than 0"):
        farms.analyze({"weight": gaussian(20, 20)}, ratio=-1)
    with pytest.raises(InputError, match="no safetensors file"):
        farms.analyze(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match=r"a\.safetensors cannot be read"):
        farms.analyze(tmp_path)
