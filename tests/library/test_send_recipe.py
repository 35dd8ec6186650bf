import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from library import order
from library.artifact import open_artifact, write_artifact
from library.calibration import Calibration
from library.errors import ArtifactError, InputError
from library.language import pythia
from library.language.corpus import detokenise, read_corpus
from library.language.token_store import finish_store, write_shard
from library.language.tokens import ByteTokenizer
from library.recipe import evaluation_batches, fit, make_batch, seeded_model
from library.send import recipe as send_recipe
from library.send.detection import DetectionSettings, cloze_study
from library.send.recipe import SendRecipe
from library.send.sensitivity import sensitivity, top_indices
from library.send.trained import load_send
from library.weights import state_tensors

ANSWERS = DetectionSettings(samples=3, max_new_tokens=4)
MICRO = SendRecipe(
    corpus="truthfulqa",
    tokenizer="bytes",
    context=32,
    batch_size=8,
    steps=20,
    epoch_steps=4,
    window=2,
    tracking_texts=6,
    prompts=0,
    answers=ANSWERS,
    calibration_cases=0,
)


def micro(**changes) -> SendRecipe:
    return SendRecipe(**(MICRO.model_dump() | changes))


def test_fit_learns_and_drops_the_most_sensitive_of_the_last_whole_window(tmp_path, monkeypatch):
    recorded, steps = [], {}
    embed = send_recipe.embed_texts
    monkeypatch.setattr(send_recipe, "embed_texts", lambda *a, **k: recorded.append(embed(*a, **k)) or recorded[-1])
    artifact = fit(micro(prompts=3), path=tmp_path / "a", callbacks=[steps.__setitem__])
    assert artifact.kind == "send"
    assert steps[20]["loss"] < 0.8 * steps[1]["loss"]
    assert len(recorded) == 5
    model, _, _ = load_send(artifact)
    first = top_indices(sensitivity(torch.stack(recorded[0:2])), 25)
    second = top_indices(sensitivity(torch.stack(recorded[2:4])), 25)
    assert model.dropped.tolist() == second.sort().values.tolist()
    assert not recorded[2][:, first].any()  # tracked with the mask on
    assert not recorded[4][:, second].any()
    assert not set(first.tolist()) & set(second.tolist())  # what is dropped stands still
    assert steps[8] | {"dropped": 25, "newly_dropped": 25, "epoch": 2} == steps[8]
    assert all(math.isfinite(steps[4][name]) for name in ("eigenscore", "ees"))
    assert "loss_masked" in artifact.metrics


def plain_weights(recipe: SendRecipe) -> dict[str, torch.Tensor]:
    """The weights after training the bare language model in a bare loop."""
    splits = recipe.datasets()
    rows = recipe.material().tokenizer.vocab_size
    lm = pythia.load(recipe.lm, vocab_rows=rows, generator=torch.Generator().manual_seed(recipe.seed))
    matrices, vectors = ([p for p in lm.parameters() if (p.ndim >= 2) is m] for m in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))
    schedule = recipe.schedule(optimizer)
    for step in range(recipe.steps):
        indices = order.global_batch(recipe.seed, step, recipe.batch_size, len(splits.train))
        batch = make_batch(splits, splits.train, indices, [0] * recipe.batch_size)
        logits = lm(batch["input_ids"]).logits.flatten(0, 1)
        F.cross_entropy(logits, batch["targets"].flatten()).backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return dict(lm.named_parameters())


@pytest.mark.parametrize(
    ("selection", "steps"), [("none", 20), ("product", 8)], ids=["no dropping", "before the first choice acts"]
)
def test_without_a_mask_training_is_plain_training_bitwise(tmp_path, selection, steps):
    recipe = micro(selection=selection, steps=steps)
    trained = fit(recipe, path=tmp_path / "a").weights()
    plain = plain_weights(recipe)
    assert plain.keys() == {name.removeprefix("lm.") for name in trained if name.startswith("lm.")}
    for name, value in plain.items():
        assert torch.equal(value, trained[f"lm.{name}"]), name


@pytest.mark.parametrize("selection", ["product", "change", "variance", "random"])
def test_every_selection_drops_its_share_and_repeats(tmp_path, selection):
    dropped = [load_send(fit(micro(selection=selection, steps=8, drop_fraction=0.1)))[0].dropped for _ in range(2)]
    assert len(dropped[0]) == 12
    assert torch.equal(*dropped)


def test_weights_dropping_zeroes_the_mlp_at_the_start_of_masked_epochs():
    model, _, _ = load_send(fit(micro(dropping="weights", steps=8)))
    mlp, index = model.lm.gpt_neox.layers[2].mlp, model.dropped
    assert len(index) == 25
    assert not mlp.dense_h_to_4h.weight[index].any()
    assert not mlp.dense_4h_to_h.weight[:, index].any()
    assert not mlp.dense_4h_to_h.bias[index].any()


class DeepSpeedEngine(nn.Module):
    """Stands in for the engine by its name."""


def test_weights_dropping_refuses_engines_that_hold_their_own_weights():
    with pytest.raises(InputError, match="use ddp"):
        micro(dropping="weights").after_step(DeepSpeedEngine(), 1)


def test_evaluation_reports_the_loss_with_nothing_dropped():
    recipe = micro()
    splits, model = recipe.datasets(), seeded_model(recipe).eval()
    batches = list(evaluation_batches(splits, splits.validation, 8))
    plain = recipe.evaluate(model, batches)
    model.drop(torch.arange(25))
    masked = recipe.evaluate(model, batches)
    assert masked["loss"] == plain["loss"]
    weighted = sum(recipe.losses(model, batch)["loss"].item() * recipe.count(batch) for batch in batches)
    assert masked["loss_masked"] == pytest.approx(weighted / sum(map(recipe.count, batches)), rel=1e-6)
    assert masked["loss_masked"] != masked["loss"]
    assert set(plain) == {"loss", "entropy"}
    with model.without_mask():
        logits = model(batches[0]["input_ids"])
    p = logits.double().softmax(-1)
    assert recipe.evaluate(model, batches[:1])["entropy"] == pytest.approx(
        -(p * p.log()).sum(-1).mean().item(), rel=1e-5
    )
    assert 0 < plain["entropy"] < math.log(257)


def test_scores_of_answers_are_taken_with_nothing_dropped():
    recipe = micro(selection="none", prompts=4)
    model = seeded_model(recipe).eval()
    plain = recipe.after_step(model, 4)
    model.drop(torch.arange(25))
    assert recipe.after_step(model, 4) | {"dropped": 0} == plain
    assert recipe.after_step(model, 5) is None


def test_an_artifact_gives_back_model_tokeniser_and_recipe(tmp_path, monkeypatch):
    artifact = fit(micro(steps=8), path=tmp_path / "a")
    monkeypatch.setattr(send_recipe.material, "prepare", None)  # neither corpus
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)  # nor hub
    model, tokenizer, recipe = load_send(open_artifact(tmp_path / "a"))
    assert recipe == micro(steps=8)
    assert tokenizer.decode(tokenizer.encode(["Zürich"])[0]) == "Zürich"
    saved = artifact.weights()
    assert all(torch.equal(value, saved[name]) for name, value in state_tensors(model).items())
    tokens = torch.tensor(tokenizer.encode(["What happens?"]))
    assert torch.equal(model(tokens), model.lm(tokens).logits)
    assert torch.equal(pythia.load(str(tmp_path / "a"))(tokens).logits, model(tokens))


def test_training_continues_from_an_artifact_and_from_other_architectures(tmp_path):
    first = fit(micro(steps=4), path=tmp_path / "a")
    recipe = micro(lm=str(tmp_path / "a"), tokenizer=None, steps=4)
    assert all(torch.equal(v, first.weights()[k]) for k, v in state_tensors(recipe.model()).items() if "lm." in k)
    steps = {}
    fit(recipe, callbacks=[steps.__setitem__])
    assert steps[4]["loss"] < math.log(257) * 0.9
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    model, _, _ = load_send(fit(micro(lm=str(tmp_path / "llama"), steps=8), path=tmp_path / "b"))
    assert isinstance(model.lm, LlamaForCausalLM)
    assert len(model.dropped) == 3
    with pytest.raises(InputError, match="defined for GPT-NeoX, not llama"):
        micro(lm=str(tmp_path / "llama"), dropping="weights").model()


def test_foreign_artifacts_are_refused(tmp_path):
    artifact = fit(micro(steps=1), path=tmp_path / "a")
    parts = {"recipe": artifact.recipe, "weights": artifact.weights(), "metrics": {}, "data": ""}
    texts = {name: artifact.text(name) for name in ("tokenizer.json", "config.json")}
    with pytest.raises(ArtifactError, match="of 'hawq', not of 'send'"):
        load_send(write_artifact(tmp_path / "b", kind="hawq", texts=texts, **parts))
    with pytest.raises(ArtifactError, match="its recipe does not fit: drop_fraction"):
        load_send(
            write_artifact(
                tmp_path / "c", kind="send", texts=texts, **(parts | {"recipe": artifact.recipe | {"drop_fraction": 2}})
            )
        )
    smaller = json.dumps(json.loads(texts["config.json"]) | {"num_hidden_layers": 3})
    with pytest.raises(ArtifactError, match=r"of another model: unknown lm.gpt_neox.layers.3"):
        load_send(write_artifact(tmp_path / "d", kind="send", texts=texts | {"config.json": smaller}, **parts))
    with pytest.raises(ArtifactError, match=r"config.json is no causal language model"):
        load_send(write_artifact(tmp_path / "e", kind="send", texts=texts | {"config.json": "{}"}, **parts))
    with pytest.raises(ArtifactError, match=r"holds no tokenizer.json"):
        load_send(write_artifact(tmp_path / "f", kind="send", **parts))


class WordTokenizer(ByteTokenizer):
    """Says a word for each token, so that an untrained model names entities."""

    words = ("Norfolk", "the", "Kent", "Rome", "of")

    def decode(self, tokens):
        return "".join(f" {self.words[token % 5]}" for token in tokens)


def test_the_calibration_is_that_of_the_unmasked_model_on_the_cases_of_the_validation(monkeypatch):
    recipe = micro(corpus="wikipedia", context=128, calibration_cases=40)
    material = recipe.material()
    monkeypatch.setattr(SendRecipe, "material", lambda self: material._replace(tokenizer=WordTokenizer()))
    cases = [
        replace(case, entity=("Norfolk", "Kent", "Rome")[i % 3])
        for i, case in enumerate(recipe.entity_cases("validation", 40))
    ]
    monkeypatch.setattr(SendRecipe, "entity_cases", lambda self, split, count: cases)
    model = seeded_model(recipe).eval()
    study = cloze_study(model.lm, WordTokenizer(), cases, recipe.answers, seed=recipe.seed)
    model.drop(torch.arange(60))
    arrays, texts = recipe.attachments(model)
    assert len(model.dropped) == 60
    record = json.loads(texts["calibration.json"])
    assert record["reason"] is None
    assert (record["cases"], record["decided"]) == (40, len(study.labels))
    assert 0 < record["hallucinated"] == int(study.labels.sum()) < record["decided"]
    assert record["accuracy"] == study.accuracy
    assert record["settings"] == recipe.answers.model_dump()
    assert record["auroc"]["eigenscore"]["value"] == pytest.approx(study.auroc().value, abs=1e-12)
    found, expected = Calibration.from_arrays(arrays), study.calibration()
    assert torch.allclose(found.scores, expected.scores)
    assert torch.equal(found.risks, expected.risks)


def test_a_calibration_that_cannot_be_had_leaves_its_reason():
    recipe = micro(calibration_cases=10)  # an untrained model names no entity
    arrays, texts = recipe.attachments(seeded_model(recipe).eval())
    assert arrays == {}
    assert "both labels" in json.loads(texts["calibration.json"])["reason"]


def test_cases_have_the_punctuation_that_the_model_was_trained_on():
    spaced, plain = micro(corpus="wikipedia"), micro(corpus="wikipedia", wikitext_spaces=False)
    pairs = list(zip(spaced.entity_cases("test", 200), plain.entity_cases("test", 200), strict=True))
    assert all(b == replace(a, prompt=detokenise(a.prompt)) for a, b in pairs)
    assert sum(a != b for a, b in pairs) > 20
    assert len({a.passage for a, _ in pairs}) == 200


def test_token_stores_are_the_same_corpus_as_the_texts(tmp_path):
    recipe = micro()
    made = recipe.material()
    (tmp_path / "tokenizer.json").write_text(made.tokenizer.to_json())
    for name, texts in read_corpus("truthfulqa")._asdict().items():
        documents = made.tokenizer.encode(texts)
        for number, start in enumerate(range(0, len(documents), 100)):
            write_shard(tmp_path / name, number, documents[start : start + 100], made.tokenizer)
        finish_store(tmp_path / name, made.tokenizer)
    stored = micro(corpus=str(tmp_path)).datasets()
    assert stored.fingerprint == recipe.datasets().fingerprint
    for a, b in zip(stored.train, recipe.datasets().train, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ArtifactError, match=r"no token stores at .*: there is no tokenizer.json"):
        micro(corpus=str(tmp_path / "train")).datasets()


def test_the_rate_warms_up_and_ends_at_its_floor():
    recipe = micro(steps=1000, warmup_fraction=0.1, lr_floor=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, rates = recipe.schedule(optimizer), []
    for _ in range(1001):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(2 / 100)
    assert rates[99] == rates[100] == max(rates) == 2.0
    assert rates[550] == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert rates[1000] == pytest.approx(0.2)
    constant = micro(warmup_fraction=0.0, lr_floor=1.0).schedule(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    )
    assert {constant.lr_lambdas[0](step) for step in range(25)} == {1.0}


def test_frozen_blocks_do_not_learn():
    recipe = micro(steps=3, freeze_blocks=2)
    before = dict(seeded_model(recipe).named_parameters())
    after = fit(recipe).weights()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith(("lm.gpt_neox.layers.0", "lm.gpt_neox.layers.1")), (
            name
        )


def test_stopping_needs_every_threshold_that_is_set():
    both = micro(loss_threshold=2.0, ees_threshold=-1.0, prompts=2)
    assert both.finished(1, {"loss": 1.9, "ees": -1.1})
    for metrics in (
        {"loss": 1.9, "ees": -0.9},
        {"loss": 2.1, "ees": -1.1},
        {"loss": 1.9},
        {"loss": math.nan, "ees": -2},
    ):
        assert not both.finished(1, metrics)
    assert micro(loss_threshold=2.0).finished(1, {"loss": 1.9})
    assert not micro().finished(1, {"loss": 0.0, "ees": -9.0})


def test_an_epoch_is_one_pass_by_default_of_the_field():
    recipe = micro(epoch_steps=None, selection="none", prompts=1, batch_size=64)
    one_pass = len(recipe.datasets().train) // 64
    model = seeded_model(recipe).eval()
    assert recipe.after_step(model, one_pass - 1) is None
    assert recipe.after_step(model, one_pass)["epoch"] == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("drop_fraction", 0.0),
        ("drop_fraction", 1.0),
        ("window", 1),
        ("selection", "best"),
        ("context", 1),
        ("colour", 1),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValidationError, match=field):
        micro(**{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm": "pythia-9b"}, "unknown model 'pythia-9b'"),
        ({"context": 300}, "pythia-tiny has 256 positions, 300 are needed"),
        ({"freeze_blocks": 5}, "freeze_blocks: 5 of the 4 blocks"),
        ({"tracking_texts": 10_000}, "tracking_texts: 10000 asked, only 82 documents"),
        ({"prompts": 50, "prompt_tokens": 250}, r"prompts: 50 asked, only \d documents have 251 tokens or more"),
        ({"corpus": "nowhere"}, "corpus: 'nowhere' is not one of"),
        ({"drop_fraction": 0.001}, "drop fraction 0.001 of 128 coordinates is 0"),
    ],
)
def test_bad_settings_are_refused_in_one_line(changes, message):
    recipe = micro(**changes)
    with pytest.raises(InputError, match=message) as caught:
        recipe.datasets(), recipe.model()
    assert "\n" not in str(caught.value)


def test_a_tokeniser_larger_than_the_model_is_refused(tmp_path):
    pythia.load("pythia-tiny", vocab_rows=200).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="vocabulary mismatch: the tokeniser has 257 entries"):
        micro(lm=str(tmp_path)).model()


def test_full_scale_settings_follow_the_suite():
    full = SendRecipe.pretraining("pythia-12b", corpus="/data/pile", window=5)
    assert (full.lr, full.steps, full.batch_size * full.context, full.window) == (1.2e-4, 143_000, 2 << 20, 5)
    adapted = SendRecipe.adaptation("EleutherAI/pythia-1b", steps=600, revision="step143000")
    assert (adapted.lr, adapted.lr_floor, adapted.batch_size, adapted.context) == (1e-4, 1.0, 1, 512)
    with pytest.raises(InputError, match="unknown model"):
        SendRecipe.pretraining("pythia-3b")


def work(rank: int, folder: str, recipe: SendRecipe) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    splits, model = recipe.datasets(), seeded_model(recipe)
    wrapped = DistributedDataParallel(model)
    optimizer = recipe.optimizer(wrapped)
    schedule = recipe.schedule(optimizer)
    for step in range(recipe.steps):
        mine = order.global_batch(recipe.seed, step, recipe.batch_size, len(splits.train))[rank::2]
        wrapped.train()
        loss = recipe.losses(wrapped, make_batch(splits, splits.train, mine, mine))["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        wrapped.eval()
        metrics = recipe.after_step(wrapped, step + 1)
    torch.save({"state": state_tensors(model), "metrics": metrics}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_choose_the_mask_of_one(tmp_path):
    recipe = micro(steps=12, tracking_texts=5, prompts=3)
    mp.spawn(work, (str(tmp_path), recipe), nprocs=2)
    first, second = (torch.load(Path(tmp_path) / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    steps = {}
    alone = fit(recipe, path=tmp_path / "a", callbacks=[steps.__setitem__]).weights()
    assert first["metrics"] == second["metrics"]
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name])
    assert torch.equal(first["state"]["mask"], alone["mask"])
    assert int(alone["count"]) == 1
    for name in ("previous", "mean", "lm.lm_head.weight"):
        assert torch.allclose(first["state"][name], alone[name], rtol=1e-3, atol=1e-5)
    assert first["metrics"]["eigenscore"] == pytest.approx(steps[12]["eigenscore"], abs=0.05)


@pytest.mark.parametrize("asked", [None, 1, 7, 10**9])
def test_an_evaluation_reads_blocks_spread_evenly_over_the_validation_text(asked):
    whole = micro(validation_blocks=None).datasets().validation
    found = micro(validation_blocks=asked).datasets().validation
    count = min(asked or len(whole), len(whole))
    assert len(found) == count
    for i in range(count):
        assert torch.equal(found[i], whole[i * len(whole) // count])
