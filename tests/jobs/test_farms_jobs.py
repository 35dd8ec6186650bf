"""FARMS on Ray: tasks give what the library gives, a restart skips what is done, two workers prune as one."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from jobs.farms import FarmsJob
from jobs.farms_prune import FarmsPruneJob, prepare
from library import farms
from library.artifact import open_artifact
from library.errors import InputError
from library.farms.analysis import Settings
from library.farms.causal_lm import block_layers, perplexity
from library.farms.prune import Pruning, prune_causal_lm
from library.language import pythia

TAILS = Settings(window=16, ops=3)
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a GPT-NeoX and a Llama."""
    root = tmp_path_factory.mktemp("farms")
    words = ["a river in the north", "the oldest town of the county", "it was built of stone in 1850 by two masons"]
    texts = [f"{words[i % 3]}, number {i * i}, {words[i % 2]}." for i in range(80)]
    pd.DataFrame({"text": texts}).to_csv(root / "corpus.csv", index=False)
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.1}
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).save_pretrained(root / "neox")
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).save_pretrained(root / "llama")
    return root


def test_a_task_per_layer_gives_the_librarys_table_and_a_restart_skips_what_is_kept(ray_cluster, folder, tmp_path):
    job = FarmsJob(model=str(folder / "llama"), analysis=TAILS, out=str(tmp_path / "out"))
    report = job.run()
    expected = farms.analyze(folder / "llama", TAILS)
    found = report.tables["layers"].drop(columns="log_quantiles")
    pd.testing.assert_frame_equal(found, expected)
    plain = report.tables["plain"].drop(columns="log_quantiles")
    pd.testing.assert_frame_equal(plain, farms.analyze(folder / "llama", TAILS, method="plain"))
    first = report.tables["layers"].iloc[0]
    assert first["log_quantiles"][-1] == pytest.approx(first["log_spectral_norm"])
    assert np.diff(first["log_quantiles"]).min() >= 0
    assert report.metrics["layers"] == len(expected) == 15
    assert (Path(report.folder) / "layers.parquet").is_file()

    kept = sorted((tmp_path / "out" / "layers").glob("*.json"))
    assert len(kept) == 30
    marked = json.loads(kept[0].read_text()) | {"warning": "this one was kept"}
    kept[0].write_text(json.dumps(marked))
    kept[1].unlink()
    again = job.run()
    warnings = [*again.tables["layers"]["warning"], *again.tables["plain"]["warning"]]
    assert sorted(warnings)[-1] == "this one was kept"
    assert kept[1].is_file()
    other = job.model_copy(update={"analysis": TAILS.model_copy(update={"rule": "ks"})})
    assert "this one was kept" not in list(other.run().tables["layers"]["warning"])


def test_weights_can_travel_and_a_layer_at_fault_is_named(ray_cluster, folder, tmp_path):
    shipped = FarmsJob(model=str(folder / "neox"), analysis=TAILS, compare=False, send_weights=True).run()
    expected = farms.analyze(folder / "neox", TAILS)
    pd.testing.assert_frame_equal(shipped.tables["layers"].drop(columns="log_quantiles"), expected)
    broken = torch.randn(20, 20)
    broken[0, 0] = torch.inf
    save_file({"good.weight": torch.randn(20, 20), "bad.weight": broken}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="layer bad: 1 of 400 weights are not finite"):
        FarmsJob(model=str(tmp_path / "m.safetensors"), analysis=TAILS).run()
    with pytest.raises(InputError, match="no safetensors file"):
        FarmsJob(model=str(tmp_path / "nothing")).run()
    with pytest.raises(InputError, match="prism run send"):
        FarmsJob().run()


def pruning_job(folder: Path, **changes: object) -> FarmsPruneJob:
    settings = {
        "model": str(folder / "neox"),
        "corpus": str(folder / "corpus.csv"),
        "tokenizer": "bytes",
        "context": 32,
        "calibration": 9,
        "evaluation": 7,
        "batch_size": 3,
        "pruning": Pruning(pruner="sparsegpt", sparsity=0.6, epsilon=(0.1, 0.5), analysis=TAILS),
        "storage": str(folder / "runs"),
    }
    return FarmsPruneJob(**(settings | changes))


def test_two_workers_prune_as_one_and_the_sparse_model_is_registered(ray_cluster, ready_registry, folder):
    job = pruning_job(folder)
    one = job.run()
    two = pruning_job(folder, scaling={"workers": 2}).run()
    lm = pythia.load(str(folder / "neox"))
    texts = job.texts("bytes")[0]
    assert one.metrics["perplexity_before"] == pytest.approx(perplexity(lm, texts.test), rel=1e-6)
    expected = prune_causal_lm(lm, texts, job.pruning, batch_size=3)
    assert one.metrics == pytest.approx(expected.metrics)
    assert two.metrics == pytest.approx(expected.metrics, rel=1e-4)
    assert (one.registered, two.registered) == ("models:/farms/1", "models:/farms/2")
    weights = [open_artifact(report.artifact, kind="farms").weights() for report in (one, two)]
    for layer in block_layers(lm):
        name = f"{layer.name}.weight"
        assert torch.equal(weights[0][name], layer.module.weight)
        assert ((weights[0][name] == 0) == (weights[1][name] == 0)).float().mean() > 0.999
    table = one.tables["layers"]
    assert (table["sparsity"] * table["parameters"]).sum() / table["parameters"].sum() == one.metrics["sparsity"]
    assert set(one.tables["epsilon"]["epsilon"]) == {0.1, 0.5}
    assert json.loads(open_artifact(one.artifact).text("layers.json"))[0]["layer"] == table["layer"][0]
    again = farms.analyze(one.artifact, TAILS)  # what was pruned can be analysed
    assert again["zero_fraction"].notna().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 65}, "65 tokens, the model has 64 positions"),
        ({"calibration": 100_000}, "calibration: 100000 sequences asked"),
        ({"model": "nothing"}, "'nothing' is neither a folder nor a hub name"),
        ({"corpus": "nothing"}, "corpus: 'nothing' is not one of"),
    ],
)
def test_what_does_not_fit_together_is_refused(folder, changes, message):
    job = pruning_job(folder, **changes)
    with pytest.raises(InputError, match=message):
        prepare(job, job.model)


def test_a_refusal_of_the_workers_is_one_line_here(ray_cluster, folder):
    with pytest.raises(InputError, match=r"^context: 65 tokens, the model has 64 positions$"):
        pruning_job(folder, context=65).run()
    with pytest.raises(InputError, match="not elastic"):
        pruning_job(folder, scaling={"workers": (1, 2)}).run()
