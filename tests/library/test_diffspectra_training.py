"""Recipes of DiffSpectra and its pre-training: losses, averages, clipping, artifacts; what batches cannot change."""

import copy
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from library import order
from library.artifact import open_artifact
from library.diffspectra.clipping import adaptive_limit, remembered
from library.diffspectra.denoiser import DenoiserSettings
from library.diffspectra.generation import Elucidator
from library.diffspectra.geometry_encoder import GeometrySettings
from library.diffspectra.pretraining import contrastive_loss, hidden_patches, reconstruction_loss
from library.diffspectra.pretraining_recipe import PretrainingRecipe, load_encoder, warmed_cosine
from library.diffspectra.recipe import DiffSpectraRecipe, load_diffspectra, warmed_up
from library.diffspectra.sampling import Sampling
from library.diffspectra.specformer import SpecFormer, SpecFormerSettings
from library.errors import ArtifactError, InputError
from library.recipe import fit, make_batch, seeded_model
from library.recipes import trained_model
from tests.library.diffspectra_cases import PATCHES, golden

ENCODER = SpecFormerSettings(**PATCHES, width=8, heads=2, layers=1, features=16)
DENOISER = DenoiserSettings(width=24, pair_width=6, heads=4, blocks=2, condition=16, dropout=0.0)
SMALL = {"encoder": ENCODER, "denoiser": DENOISER, "most_atoms": 9, "batch_size": 8, "validation_times": 2}
PRETRAINING = {"encoder": ENCODER, "geometry": GeometrySettings(width=8, layers=1), "most_atoms": 9, "batch_size": 8}


def first_batch(recipe, size=8):
    splits = recipe.datasets()
    indices = order.global_batch(0, 0, size, len(splits.train))
    return make_batch(splits, splits.train, indices, order.sample_keys(0, 0, size))


def validated(recipe, model, size=8):
    """The metrics of the validation molecules in batches of `size`."""
    splits = recipe.datasets()
    indices = range(len(splits.validation))
    batches = [indices[i : i + size] for i in range(0, len(indices), size)]
    return recipe.evaluate(model, (make_batch(splits, splits.validation, b, b) for b in batches))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return fit(PretrainingRecipe(steps=2, **PRETRAINING), path=tmp_path_factory.mktemp("pre") / "a", device="cpu")


def test_training_learns_and_its_artifact_gives_candidates(tmp_path):
    recipe = DiffSpectraRecipe(steps=60, warmup=5, lr=3e-3, average=0.9, modality_dropout=0.2, **SMALL)
    artifact = fit(recipe, path=tmp_path / "a", device="cpu")
    before = validated(recipe, seeded_model(recipe).eval())
    assert artifact.metrics.keys() == before.keys() == {"loss", "position", "atom", "bond", "count"}
    for name in ("loss", "atom", "bond", "count"):
        assert artifact.metrics[name] < 0.9 * before[name], name
    network, again = load_diffspectra(open_artifact(artifact.path))
    assert again == recipe
    model, same = trained_model(artifact)
    assert same == recipe
    averaged = network.state_dict()
    for kept in (model.network, model.average):
        assert all(torch.equal(value, averaged[name]) for name, value in kept.state_dict().items())
    assert validated(recipe, model.eval()) == pytest.approx(artifact.metrics, rel=1e-4)
    assert not [name for name in artifact.shapes() if name.startswith(("network.", "average."))]
    elucidator, data = Elucidator.from_artifact(artifact), recipe.molecules()
    strengths = torch.stack([data.signals["ir"](i).strengths.sum() for i in data.parts["train"].tolist()])
    low, high = strengths.quantile(torch.tensor([0.3, 0.6])).tolist()
    assert low < elucidator.areas["ir"] < high
    queries = elucidator.queries(data, data.parts["test"][:2].tolist())
    partly = [replace(one, spectra={"raman": one.spectra["raman"]}) for one in queries]
    found = elucidator.find([*queries, *partly], Sampling(samples=2, steps=3))
    assert [len(one.samples) for one in found] == [2] * 4
    assert found[2].modalities == ("raman",)
    with pytest.raises(ArtifactError, match="not of 'diffspectra'"):
        load_diffspectra(fit(PretrainingRecipe(steps=1, **PRETRAINING), path=tmp_path / "b", device="cpu"))


def test_losses_are_weighted_sums_of_their_parts():
    recipe = DiffSpectraRecipe(**SMALL)
    model, batch = seeded_model(recipe).eval(), first_batch(recipe)
    found = recipe.losses(model, batch)
    parts = found["position"] + found["atom"] + found["bond"] + recipe.count_weight * found["count"]
    torch.testing.assert_close(found["loss"], parts)
    doubled = DiffSpectraRecipe(**SMALL, loss_weights=(2.0, 0.5, 0.2), count_weight=0.2).losses(model, batch)
    torch.testing.assert_close(doubled["loss"], 2 * found["loss"])


def test_groups_by_size_change_nothing_of_loss_or_gradient():
    recipe = DiffSpectraRecipe(**SMALL, self_condition=0.5)
    one = seeded_model(recipe)
    batch, gradients = first_batch(recipe), []
    for groups in (1, 3, 8, 11):
        model = copy.deepcopy(one).train()
        model.size_groups = groups
        loss = recipe.losses(model, batch)["loss"]
        loss.backward()
        gradients.append((loss.detach(), [p.grad for p in model.network.parameters()]))
    for loss, each in gradients[1:]:
        torch.testing.assert_close(loss, gradients[0][0], rtol=1e-5, atol=0)
        for a, b in zip(each, gradients[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_every_weight_takes_part_in_every_step():
    recipe = DiffSpectraRecipe(**SMALL, modality_dropout=0.5)
    model = seeded_model(recipe).train()
    recipe.losses(model, first_batch(recipe))["loss"].backward()
    assert not [name for name, p in model.network.named_parameters() if p.grad is None]
    assert not [name for name, p in model.average.named_parameters() if p.requires_grad]


def test_self_conditioned_molecules_alone_see_their_first_prediction():
    recipe = DiffSpectraRecipe(**SMALL)
    model, batch = seeded_model(recipe).eval(), first_batch(recipe)
    flags = torch.tensor([True, False] * 4)
    never = model(batch._replace(self_conditioned=torch.zeros(8, dtype=torch.bool))).predicted
    some = model(batch._replace(self_conditioned=flags)).predicted
    differs = (some.nodes - never.nodes).abs().amax((1, 2)) > 1e-6
    assert torch.equal(differs, flags)


def test_hidden_spectra_do_not_matter():
    recipe = DiffSpectraRecipe(**SMALL, condition_dropout=0.5)
    model, batch = seeded_model(recipe).eval(), first_batch(recipe)
    hidden = torch.tensor([True, False] * 4)
    a, b = (
        model(batch._replace(unconditioned=hidden, spectra=spectra)).predicted.nodes
        for spectra in (batch.spectra, {name: one + 1 for name, one in batch.spectra.items()})
    )
    assert torch.equal(a[hidden], b[hidden])
    assert (a[~hidden] - b[~hidden]).abs().amax((1, 2)).min() > 0


def test_averages_follow_with_a_warm_up_and_answer_in_evaluation():
    recipe = DiffSpectraRecipe(**SMALL)
    model = seeded_model(recipe)
    start = [p.detach().clone() for p in model.network.parameters()]
    with torch.no_grad():
        for p in model.network.parameters():
            p.add_(1.0)
    recipe.after_step(model, 1)
    for mean, before in zip(model.average.parameters(), start, strict=True):
        torch.testing.assert_close(mean, before + 9 / 11, rtol=0, atol=1e-5)
    model.network.encoder.layers[0].last_norm.running_mean.fill_(3.0)
    recipe.after_step(model, 1_000_000)
    for mean, before in zip(model.average.parameters(), start, strict=True):
        torch.testing.assert_close(mean, before + 1 - 0.999 * 2 / 11, rtol=0, atol=1e-5)
    assert (model.average.encoder.layers[0].last_norm.running_mean == 3).all()
    batch = first_batch(recipe)
    with torch.no_grad():
        answer = model.eval()(batch).predicted.nodes
        for p in model.network.parameters():
            p.zero_()
        assert torch.equal(model(batch).predicted.nodes, answer)


def test_curvature_in_evaluation_is_of_the_weights_that_learn():
    recipe = DiffSpectraRecipe(steps=1, **SMALL)
    model, batch = seeded_model(recipe).eval(), first_batch(recipe)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    first = torch.autograd.grad(recipe.losses(model, batch)["loss"], weights, create_graph=True)
    along = [torch.randn(g.shape, generator=torch.Generator().manual_seed(0)) for g in first]
    product = torch.autograd.grad(sum((g * v).sum() for g, v in zip(first, along, strict=True)), weights)
    assert all(part.isfinite().all() for part in product)
    assert sum(part.square().sum() for part in product) > 0


def test_the_gradient_limit_follows_the_last_fifty_norms():
    norms: tuple[float, ...] = ()
    for _ in range(49):
        assert adaptive_limit(norms, 10.0) == 10.0, "3000 is among them"
        norms = remembered(norms, 2.0, 10.0)
    norms = remembered(norms, 2.0, 10.0)
    assert len(norms) == 50
    assert adaptive_limit(norms, 10.0) == pytest.approx(3.0)
    norms = remembered(norms, 100.0, 10.0)
    assert norms[-1] == pytest.approx(3.0), "counted as clipped"
    mean, spread = 2 + 1 / 50, (49 / 2500) ** 0.5
    assert adaptive_limit(norms, 10.0) == pytest.approx(1.5 * mean + 2 * spread)


def test_the_loop_clips_at_the_recipes_limit_and_notes_norms():
    class Toy(DiffSpectraRecipe, frozen=True):
        def largest_norm(self, optimizer):
            noted.append(len(optimizer.param_groups[0].get("norms", ())))
            return 1e-3

        def optimizer(self, model):
            learning = [p for p in model.parameters() if p.requires_grad]
            return torch.optim.SGD(learning, 1.0)

        def after_step(self, model, step):
            after = nn.utils.parameters_to_vector(model.network.parameters()).detach()
            moved.append(float((after - place[-1]).norm()))
            place.append(after)

    noted, moved = [], []
    recipe = Toy(steps=2, warmup=0, **SMALL)
    place = [nn.utils.parameters_to_vector(seeded_model(recipe).network.parameters()).detach()]
    fit(recipe, device="cpu")
    assert noted == [0, 2]
    assert moved == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_the_validation_loss_repeats_and_does_not_depend_on_batches():
    recipe = DiffSpectraRecipe(**SMALL)
    model = seeded_model(recipe).eval()
    whole = validated(recipe, model, 8)
    assert validated(recipe, model, 8) == whole
    for name, value in validated(recipe, model, 5).items():
        assert value == pytest.approx(whole[name], rel=1e-4)


def test_presets_are_the_published_settings():
    recipe = DiffSpectraRecipe(preset="paper", encoder={"modalities": ["ir"]}, lr=5.0)
    assert recipe.encoder == SpecFormerSettings.paper(("ir",))
    assert (recipe.lr, recipe.steps, recipe.batch_size, recipe.warmup) == (2e-4, 1_000_000, 256, 100_000)
    optimizer = recipe.optimizer(nn.Linear(2, 2))
    assert optimizer.defaults["amsgrad"]
    assert optimizer.defaults["weight_decay"] == 1e-12
    assert DiffSpectraRecipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert PretrainingRecipe(preset="paper").encoder == SpecFormerSettings.paper()
    assert [warmed_up(step, warmup=10) for step in (0, 5, 10, 99)] == [0, 0.5, 1, 1]
    assert [warmed_cosine(step, steps=30, warmup=10) for step in (0, 5, 10)] == [0, 0.5, 1]
    assert warmed_cosine(20, steps=30, warmup=10) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": {"width": 30, "heads": 4}}, "no multiple of the 4 heads"),
        ({"encoder": {"patch_length": (800, 50, 50)}}, "longer than a uv spectrum"),
        ({"encoder": {"modalities": ("nmr",)}}, "no modality 'nmr'"),
        ({"denoiser": {"width": 30, "heads": 8}}, "no multiple of the 8 heads"),
        ({"denoiser": {"blocks": 200}}, "too many"),
        ({"batch_size": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises((ValidationError, InputError), match=message):
        DiffSpectraRecipe(**settings)


def test_training_goes_on_from_a_pretrained_encoder(pretrained):
    recipe = DiffSpectraRecipe(**SMALL, pretrained=str(pretrained.path), modality_dropout=0.1)
    model = seeded_model(recipe)
    weights = pretrained.weights()
    own = {f"encoder.{name}": value for name, value in model.network.encoder.state_dict().items()}
    assert all(torch.equal(own[name], value) for name, value in weights.items() if name.startswith("encoder."))
    assert all(torch.equal(p, q) for p, q in zip(model.network.parameters(), model.average.parameters(), strict=True))
    other = SpecFormer(ENCODER.model_copy(update={"width": 16}))
    with pytest.raises(InputError, match="differs in width"):
        load_encoder(other, pretrained)


def test_patches_losses_and_contrast_equal_the_released_ones():
    arrays = golden("pretraining")
    hidden = hidden_patches(arrays["uniform"], float(arrays["mask_ratio"]))
    assert torch.equal(hidden, arrays["mask"])
    assert torch.equal(arrays["patches"] * (1 - hidden[..., None]), arrays["masked"])
    errors = (arrays["recon_pred"] - arrays["patches"]).square().mean(-1)
    torch.testing.assert_close(reconstruction_loss(errors, hidden), arrays["recon_loss"], rtol=1e-5, atol=1e-5)
    found = contrastive_loss(arrays["mol_feat"], arrays["spec_feat"], float(arrays["temperature"]))
    torch.testing.assert_close(found, arrays["contrastive_loss"], rtol=1e-5, atol=1e-5)


def test_hidden_patches_are_as_many_as_the_ratio_says_and_the_rest_does_not_matter():
    for patches, ratio in ((69, 0.1), (139, 0.1), (139, 0.5), (10, 0.25)):
        hidden = hidden_patches(torch.rand(3, patches), ratio)
        assert (patches - hidden.sum(1)).tolist() == [int(patches * (1 - ratio))] * 3
    hidden = hidden_patches(torch.rand(3, 20), 0.3)
    errors = torch.rand(3, 20)
    changed = torch.where(hidden > 0, errors, errors + 5)
    assert torch.equal(reconstruction_loss(errors, hidden), reconstruction_loss(changed, hidden))


def test_contrast_of_orthonormal_features_and_of_random_ones():
    features = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))[0]
    exact = torch.log1p(11 * torch.exp(torch.tensor(-1 / 0.07)))
    torch.testing.assert_close(contrastive_loss(features, features, 0.07), exact, rtol=0.2, atol=1e-6)
    torch.testing.assert_close(
        contrastive_loss(features, features, 1.0), torch.log1p(11 * torch.exp(torch.tensor(-1.0)))
    )
    assert float(contrastive_loss(features, features.flip(0), 0.07)) > 5
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(256, 512, generator=generator) for _ in range(2))
    assert float(contrastive_loss(a, b, 1.0)) == pytest.approx(torch.log(torch.tensor(256.0)).item(), rel=0.01)


def test_pretraining_learns_to_fill_in_and_to_match(tmp_path):
    sizes = {"geometry": GeometrySettings(width=16), "most_atoms": 12}
    recipe = PretrainingRecipe(steps=150, warmup=5, lr=5e-3, **PRETRAINING | sizes)
    artifact = fit(recipe, path=tmp_path / "a", device="cpu")
    before = validated(recipe, seeded_model(recipe).eval())
    for name in ("contrast", "reconstruct", "denoise"):
        assert artifact.metrics[name] < 0.95 * before[name], name
    assert artifact.metrics.keys() == {"loss", "denoise", "contrast", "reconstruct", "matched"}
    with pytest.raises(ValidationError, match="hides all or none"):
        PretrainingRecipe(encoder=ENCODER, mask_ratio=0.95)
