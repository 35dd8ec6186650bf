"""HAWQ-V2 on a language model: what is fine-tuned is what is packed and read back; curvature is per token."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from library.artifact import Artifact, open_artifact, write_artifact
from library.errors import ArtifactError, InputError
from library.hawq.language import HawqLanguageRecipe, load_quantized_lm
from library.hawq.network import quantized_layers
from library.hawq.trained import measured_sensitivity
from library.recipe import fit
from library.send.recipe import SendRecipe
from library.spectral import Hessian, dense_matrix

TEXTS = {"corpus": "truthfulqa", "context": 16}
SMALL = TEXTS | {"steps": 3, "batch_size": 4, "probe_blocks": 4, "probe_batch": 2, "probes": 4, "validation_blocks": 8}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Artifact:
    recipe = SendRecipe(
        **TEXTS, tokenizer="bytes", steps=3, batch_size=4, tracking_texts=2, prompts=0, calibration_cases=0
    )
    return fit(recipe, path=tmp_path_factory.mktemp("send") / "a", device="cpu")


def recipe(trained: Artifact, **changes) -> HawqLanguageRecipe:
    return HawqLanguageRecipe(**(SMALL | {"lm": str(trained.path)} | changes))


@pytest.mark.parametrize("changes", [{}, {"distillation": 0.5, "stages": 2, "fraction": 0.5, "activation_bits": None}])
def test_fine_tuning_packs_and_reads_back_what_was_evaluated(trained, tmp_path, changes):
    made = recipe(trained, **changes)
    artifact = fit(made, path=tmp_path / "a", device="cpu")
    plan = made.plan()
    assert plan.mean_bits <= 8 * made.fraction + 1e-9
    assert len(plan.bits) == 4 * 4 + 1  # four linear layers in each block, and the output layer
    found = load_quantized_lm(open_artifact(tmp_path / "a"))
    assert found.recipe == made
    splits = made.datasets()
    batch = splits.collate([splits.validation[i] for i in range(8)], torch.zeros(8, dtype=torch.int64))
    with torch.no_grad():
        logits = found.lm(input_ids=batch["input_ids"]).logits
    loss = float(F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()))
    assert loss == pytest.approx(artifact.metrics["loss"], rel=1e-4)
    size = (tmp_path / "a" / "weights.safetensors").stat().st_size
    assert size == pytest.approx(found.layout["bytes"], rel=0.05)
    assert size < 0.5 * (trained.path / "weights.safetensors").stat().st_size
    layer = next(iter(quantized_layers(found.lm).values()))
    assert layer.weight.unique().numel() <= 2 ** max(plan.bits.values()) * len(layer.weight)
    assert found.tokenizer.decode(found.tokenizer.encode(["some words"])[0]) == "some words"
    assert measured_sensitivity(artifact).layers.names == plan.layers.names


def test_curvature_is_that_of_the_mean_over_tokens(trained):
    made = recipe(trained, probe_blocks=2, probe_batch=2)
    network, (batch,) = made.network(), made.measurement()
    operator = Hessian(network, F.cross_entropy, [batch], parameters=["lm.gpt_neox.final_layer_norm.bias"])
    exact = float(dense_matrix(operator).trace())
    probes = operator.probes(64, generator=torch.Generator().manual_seed(0))
    terms = (probes * operator(probes)).sum(0)
    assert abs(float(terms.mean()) - exact) < 5 * float(terms.std()) / 8
    assert operator.loss_and_gradient()[0] == pytest.approx(
        float(made.losses(network, {"input_ids": batch[0], "targets": batch[1].view(2, -1)})["loss"].detach()), rel=1e-5
    )


def test_what_does_not_fit_is_refused_in_one_line(trained, tmp_path):
    with pytest.raises(ValidationError, match="ggn needs the square of the vocabulary"):
        recipe(trained, curvature="ggn")
    with pytest.raises(InputError, match="context: 300 tokens, the model has 256 positions"):
        recipe(trained, context=300).network()
    with pytest.raises(InputError, match="probe_blocks: 100000 asked, the train split has "):
        recipe(trained, probe_blocks=100_000).measurement()
    foreign = write_artifact(tmp_path / "x", kind="hawq", recipe={}, weights={}, metrics={}, data="")
    with pytest.raises(ArtifactError, match="artifact of 'hawq', not of 'hawq-lm'"):
        load_quantized_lm(foreign)
    with pytest.raises(ArtifactError, match="not of 'hawq' or 'hawq-lm'"):
        measured_sensitivity(trained)
