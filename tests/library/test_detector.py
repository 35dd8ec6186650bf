"""The detector: its numbers against the functions behind it, its promises about batches, and its refusals."""

import math

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from library.artifact import write_artifact
from library.calibration import Calibration
from library.errors import ArtifactError, InputError
from library.language.tokens import ByteTokenizer
from library.recipe import seeded_model
from library.send.detection import DetectionSettings
from library.send.detector import HallucinationDetector
from library.send.ees import ees
from library.send.eigenscore import eigenscore
from library.send.recipe import SendRecipe

PROMPTS = ["The capital of France is", "Two", "In the county of North Norfolk"]
WIDTH, POSITIONS = 32, 64


def build(**changes) -> HallucinationDetector:
    config = GPTNeoXConfig(
        vocab_size=257,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        lm = GPTNeoXForCausalLM(config)
    defaults = changes.pop("defaults", DetectionSettings(samples=4, max_new_tokens=6, temperature=1.0))
    return HallucinationDetector(lm, ByteTokenizer(), defaults=defaults, **changes)


@pytest.fixture(scope="module")
def detector() -> HallucinationDetector:
    return build()


@pytest.fixture(scope="module")
def calibrated() -> HallucinationDetector:
    return build(calibration=Calibration(torch.tensor([-5.0, 5.0]).double(), torch.tensor([0.0, 1.0]).double()))


def same(first, second) -> bool:
    """Equal up to the rounding of another batch."""
    return (first.answer, first.samples) == (second.answer, second.samples) and math.isclose(
        first.eigenscore, second.eigenscore, abs_tol=1e-4
    )


def test_detection_holds_the_numbers_of_its_parts(detector):
    tokens = detector.tokenizer.encode(PROMPTS)
    decoded = detector.defaults.draw(detector.lm, tokens, seed=3, stop_token=0)
    for p, found in enumerate(detector.detect(PROMPTS, seed=3, explain=True)):
        assert found.answer == detector.tokenizer.decode(decoded.greedy.token_lists()[p])
        assert list(found.samples) == [detector.tokenizer.decode(a) for a in decoded.sampled.token_lists()[p]]
        embeddings = decoded.sampled.embeddings[p]
        assert found.eigenscore == pytest.approx(float(eigenscore(embeddings)), rel=1e-12)
        assert found.ees == pytest.approx(float(ees(embeddings).value), rel=1e-9)
        assert found.eigenscore == pytest.approx(np.log(found.eigenvalues).mean(), rel=1e-6)
        assert list(found.eigenvalues) == sorted(found.eigenvalues, reverse=True)
        assert (found.method, found.ees_standard_error, found.flags) == ("exact", 0.0, ())
        assert (found.risk, found.no_risk) == (None, "this model has no calibration")


def test_a_prompt_gets_the_same_whatever_shares_its_call(detector):
    together = detector.detect(PROMPTS, seed=[1, 2, 3])
    for p, prompt in enumerate(PROMPTS):
        assert same(detector.detect([prompt], seed=p + 1)[0], together[p])
    assert detector.detect(PROMPTS[:1])[0].eigenvalues is None


def test_identical_answers_get_the_floor(detector):
    for alpha in (1e-3, 0.1):
        for found in detector.detect(PROMPTS, top_k=1, alpha=alpha, explain=True):
            assert len(set(found.samples)) == 1
            assert found.samples[0] == found.answer
            assert found.flags == ("identical-answers",)
            assert found.eigenvalues[1:] == pytest.approx([alpha] * 3, rel=1e-6)
            embeddings = np.tile(np.random.default_rng(0).normal(size=WIDTH), (4, 1))
            [ready] = detector.detect_embeddings([embeddings], alpha=alpha)
            norm = ((embeddings[0] - embeddings[0].mean()) ** 2).sum()
            expected = (math.log(4 * norm + alpha) + 3 * math.log(alpha)) / 4
            assert ready.eigenscore == pytest.approx(expected, rel=1e-9)
            assert ready.ees == found.ees
            assert ready.flags == ("identical-answers",)


def test_risk_is_that_of_the_calibration_and_only_where_it_holds(calibrated):
    for found in calibrated.detect(PROMPTS):
        assert found.risk == pytest.approx(min(max((found.eigenscore + 5) / 10, 0), 1))
        assert found.no_risk is None
    [other] = calibrated.detect(PROMPTS[:1], samples=5, layer="middle")
    assert (other.risk, other.no_risk) == (None, "the calibration holds for samples=4, layer=penultimate")
    generator = torch.Generator().manual_seed(0)
    fitting, wide, many = calibrated.detect_embeddings(
        [torch.randn(shape, generator=generator) for shape in ((4, WIDTH), (4, 40), (6, WIDTH))]
    )
    assert fitting.risk is not None
    assert wide.no_risk == many.no_risk == f"the calibration holds for 4 answers of width {WIDTH}"


def test_empty_answers_are_flagged(calibrated, monkeypatch):
    prompt, first = PROMPTS[:1], calibrated.detect(PROMPTS[:1], max_new_tokens=1, top_k=1)[0]
    monkeypatch.setattr(calibrated.tokenizer, "end_of_text", first.answer.encode()[0] + 1)
    [found] = calibrated.detect(prompt, top_k=1)
    assert (found.answer, found.samples) == ("", ("",) * 4)
    assert found.flags == ("all-answers-empty", "identical-answers")
    assert (found.risk, found.no_risk) == (None, "no sampled answer has any token")
    [mixed] = calibrated.detect(prompt, samples=200, top_k=None, temperature=2.0)
    assert "" in mixed.samples
    assert mixed.flags == ("some-answers-empty",)


def test_ready_embeddings_of_several_shapes(detector):
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 8), (5, 6), (3, 8), (900, 4)]
    sets = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for convention in ("inside", "inside-code", "svd"):
        given = [sets[0], sets[1].numpy(), sets[2].tolist(), sets[3]]
        found = detector.detect_embeddings(given, convention=convention, explain=True)
        for detection, entry in zip(found, sets, strict=True):
            expected = float(eigenscore(entry, convention=convention))
            assert detection.eigenscore == pytest.approx(expected, rel=1e-9)
            assert (detection.answer, detection.samples) == (None, ())


def test_scores_of_texts_are_those_of_one_text_at_a_time():
    sensitive = torch.tensor([0, 5, 31])
    detector = build(sensitive=sensitive)
    texts = ["A text.", "Another, longer text, of the county.", "ab", "x" * POSITIONS]
    scores = detector.score(texts, batch_size=3)
    for text, score in zip(texts, scores, strict=True):
        ids = torch.tensor(detector.tokenizer.encode([text]))
        with torch.no_grad():
            outputs = detector.lm(ids, labels=ids, output_hidden_states=True)
        entropy = torch.distributions.Categorical(logits=outputs.logits[0, :-1]).entropy().mean()
        squares = outputs.hidden_states[-2][0].square()
        assert score.tokens == ids.shape[1]
        assert score.perplexity == pytest.approx(float(outputs.loss.exp()), rel=1e-4)
        assert score.token_entropy == pytest.approx(float(entropy), rel=1e-4)
        assert score.sensitive_energy == pytest.approx(float(squares[:, sensitive].sum() / squares.sum()), rel=1e-4)
    everything = build(sensitive=torch.arange(WIDTH)).score(texts[:1])[0]
    assert everything.sensitive_energy == pytest.approx(1.0)
    assert build().score(texts[:1])[0].sensitive_energy is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts: a list of at least 1 text"),
        ({"prompts": "one text"}, "prompts: a list of at least 1 text"),
        ({"prompts": ["fine", 3]}, r"prompts\[1\]: a text is needed, not int"),
        ({"prompts": ["fine", ""]}, r"prompts\[1\]: empty"),
        ({"prompts": ["\ud800"]}, r"prompts\[0\]: not valid Unicode"),
        ({"prompts": ["x" * 60]}, r"prompts\[0\]: too long, 60 tokens and max_new_tokens=6"),
        ({"samples": 1}, "samples: .* greater than or equal to 2, not 1"),
        ({"temperature": 0}, "temperature: .* greater than 0, not 0"),
        ({"temperature": float("inf")}, "temperature: .* finite"),
        ({"top_k": 0}, "top_k: "),
        ({"top_p": 1.5}, "top_p: "),
        ({"max_new_tokens": 0}, "max_new_tokens: "),
        ({"layer": 9}, "layer: 9 is not in this model of 3 blocks"),
        ({"layer": "last"}, "layer: "),
        ({"convention": "log2"}, "convention: "),
        ({"alpha": 0}, "alpha: "),
        ({"top": 3}, "top: unknown setting; there are samples, temperature"),
        ({"seed": [1]}, "seed: 1 seeds for 3 prompts"),
    ],
)
def test_bad_requests_name_the_field(detector, arguments, message):
    arguments = {"prompts": PROMPTS} | arguments
    with pytest.raises(InputError, match=message) as caught:
        detector.detect(arguments.pop("prompts"), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([[1.0, 2.0]], r"embeddings\[1\]: shape \(1, 2\)"),
        ([[1.0], [2.0]], r"embeddings\[1\]: shape \(2, 1\)"),
        ([1.0, 2.0], r"embeddings\[1\]: shape \(2,\)"),
        ([], r"embeddings\[1\]: shape \(0,\)"),
        ([[1.0, 2.0], [3.0]], r"embeddings\[1\]: ragged"),
        ([["a", "b"], ["c", "d"]], r"embeddings\[1\]: ragged or not numbers"),
        ([[None, 1.0], [1.0, 2.0]], r"embeddings\[1\]: ragged or not numbers"),
        ([[1.0, float("nan")], [1.0, 2.0]], r"embeddings\[1\]: a number is NaN"),
        ([[1.0, float("inf")], [1.0, 2.0]], r"embeddings\[1\]: a number is NaN, infinite"),
        ([[1e200, 1.0], [1.0, 2.0]], r"embeddings\[1\]: a number is NaN, infinite, or beyond 1e\+100"),
        ([[10**400, 1], [1, 2]], r"embeddings\[1\]: ragged or not numbers"),
    ],
)
def test_bad_embeddings_name_the_set(detector, entry, message):
    with pytest.raises(InputError, match=message):
        detector.detect_embeddings([torch.eye(3), entry])


def test_embeddings_take_no_settings_of_sampling(detector):
    with pytest.raises(InputError, match="samples: has no meaning for ready embeddings"):
        detector.detect_embeddings([torch.eye(3)], samples=3)
    with pytest.raises(InputError, match="embeddings: none given"):
        detector.detect_embeddings([])


def test_extreme_but_allowed_values_give_finite_numbers(detector):
    for found in [
        *detector.detect_embeddings([[[1e100, 0.0], [0.0, -1e100]], [[1e-100, 0.0], [0.0, 0.0]]], explain=True),
        *detector.detect(PROMPTS, temperature=1e-310, top_p=1e-300),
        *detector.detect(PROMPTS, temperature=1e300, alpha=1e-300),
    ]:
        assert math.isfinite(found.eigenscore)
        assert math.isfinite(found.ees)


@pytest.mark.parametrize(
    ("text", "message"),
    [("x", r"texts\[1\]: 1 tokens; from 2 to the model's 64"), ("x" * 65, r"texts\[1\]: 65 tokens")],
)
def test_texts_that_cannot_be_scored(detector, text, message):
    with pytest.raises(InputError, match=message):
        detector.score(["fine", text])


def test_activations_that_are_not_finite_name_the_prompt():
    broken = build()
    with torch.no_grad():
        broken.lm.gpt_neox.embed_in.weight[ord("z") + 1] = float("nan")
    with pytest.raises(InputError, match=r"prompts\[1\]: the model's activations are not finite"):
        broken.detect(["Two", "Two z"])
    with pytest.raises(InputError, match=r"texts\[1\]: the model's activations are not finite"):
        broken.score(["Two", "Two z"])


def test_detector_of_an_artifact(tmp_path):
    answers = DetectionSettings(samples=3, max_new_tokens=5)
    recipe = SendRecipe(corpus="truthfulqa", tokenizer="bytes", answers=answers, layer="middle", tracking_texts=4)
    model = seeded_model(recipe).eval()
    dropped = torch.tensor([1, 7, 100])
    model.drop(dropped)
    calibration = Calibration(torch.tensor([-9.0, 9.0]).double(), torch.tensor([0.2, 0.8]).double())
    contents = {"weights": model.state_dict(), "recipe": recipe.model_dump(mode="json"), "metrics": {}, "data": ""}
    arrays, texts = recipe.attachments(model)
    artifact = write_artifact(
        tmp_path / "whole", kind="send", arrays=arrays | calibration.arrays(), texts=texts, **contents
    )
    detector = HallucinationDetector.from_artifact(artifact)
    assert detector.defaults == answers
    [found] = detector.detect(PROMPTS[:1])
    with model.without_mask():
        [expected] = HallucinationDetector(model.lm, detector.tokenizer, calibration, answers).detect(PROMPTS[:1])
    assert found == expected
    assert 0.2 <= found.risk <= 0.8
    with model.without_mask(), torch.no_grad():
        ids = torch.tensor(detector.tokenizer.encode(PROMPTS[:1]))
        squares = model.lm(ids, output_hidden_states=True).hidden_states[2].square()
    [score] = detector.score(PROMPTS[:1])
    assert score.sensitive_energy == pytest.approx(float(squares[..., dropped].sum() / squares.sum()), rel=1e-4)

    foreign = write_artifact(tmp_path / "foreign", kind="other", texts=texts, **contents)
    with pytest.raises(ArtifactError, match="not of 'send'"):
        HallucinationDetector.from_artifact(foreign)
