"""Detection: labels on real passages, areas under the curve against oracles, and what calibration promises."""

import gzip
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from library.errors import ArtifactError, InputError
from library.samples import json_lines
from library.send import detection
from library.send.decode import sample
from library.send.detection import Calibration, DetectionSettings, auroc, hallucinated
from library.send.tokens import ByteTokenizer


@pytest.fixture(scope="module")
def lm():
    config = GPTNeoXConfig(
        vocab_size=257,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=96,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return GPTNeoXForCausalLM(config).eval()


def draws(seed: int, count: int, *, rounded: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores that tell the labels apart in part, with both labels present; rounding makes ties."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(count, generator=generator) < 0.4
    labels[0], labels[1] = True, False
    scores = torch.randn(count, generator=generator, dtype=torch.float64) + labels
    return (scores.round() if rounded else scores), labels


def test_cases_cut_before_entities_within_sentences():
    passage = {
        "title": "The Big Goodbye",
        "sentences": [
            '" The Big Goodbye " is the 12th episode of the series Star Trek : The Next Generation .',
            "Rob Bowman planned to direct the episode , said I , with Tracy Tormé .",
            "It aired in March .",
        ],
    }
    cases = detection.cloze_cases([passage])
    assert [case.entity for case in cases] == ["Star Trek", "The Next Generation", "Tracy Tormé"]
    assert cases[0].prompt == '" The Big Goodbye " is the 12th episode of the series'
    text = " ".join(passage["sentences"])
    assert all(text.startswith(f"{case.prompt} {case.entity}") for case in cases)
    assert [case.entity for case in detection.cloze_cases([passage], sentences=3)][-1] == "March"
    assert detection.cloze_cases([passage], per_passage=1) == cases[:1]
    assert detection.cloze_cases([passage], min_words=14) == cases[1:]
    assert detection.cloze_cases([passage | {"title": "Star Trek"}])[0].entity == "The Next Generation"


def test_cases_of_the_shipped_passages_restore_them():
    passages = json_lines("send", "wiki_test")
    cases = detection.cloze_cases(passages)
    assert len(cases) > len(passages)
    for case in cases:
        words = " ".join(" ".join(passages[case.passage]["sentences"][:2]).split())
        assert words.startswith(f"{case.prompt} {case.entity}")
        assert hallucinated(words[len(case.prompt) :], case.entity, ended=True) is False


@pytest.mark.parametrize(
    ("continuation", "entity", "ended", "expected"),
    [
        (" North Norfolk . It", "North Norfolk", False, False),
        (" Norfolk, and", "Norfolk", False, False),
        (" Norfolk", "Norfolk", True, False),
        (" Norfolk", "Norfolk", False, None),  # may go on to Norfolkshire
        (" Norfolkshire is", "Norfolk", False, True),
        (" Kent . It", "North Norfolk", False, True),
        (" North Kent . It", "North Norfolk", False, True),
        (" North", "North Norfolk", False, None),
        (" North ", "North Norfolk", True, None),
        (" the county", "Norfolk", False, None),
        (" norfolk is", "Norfolk", False, None),
        (" ( Norfolk", "Norfolk", False, None),
        (" U.S. law", "U.S.", False, False),
        ("", "Norfolk", True, None),
        ("   ", "Norfolk", False, None),
    ],
)
def test_labels(continuation, entity, ended, expected):
    assert hallucinated(continuation, entity, ended=ended) is expected


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(2, 60), rounded=st.booleans())
def test_area_is_that_of_scikit_learn_and_depends_on_the_order_alone(seed, count, rounded):
    scores, labels = draws(seed, count, rounded=rounded)
    result = auroc(scores, labels)
    assert result.value == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert (result.positives, result.negatives) == (int(labels.sum()), int((~labels).sum()))
    assert auroc(torch.exp(scores / 2) + 5, labels).value == result.value
    assert auroc(-scores, labels).value == pytest.approx(1 - result.value, abs=1e-12)
    assert auroc(scores, ~labels).value == pytest.approx(1 - result.value, abs=1e-12)


def test_perfect_inverted_and_constant_rankings():
    labels = torch.tensor([False] * 5 + [True] * 7)
    rising = torch.arange(12.0)
    assert auroc(rising, labels) == detection.Auroc(1.0, 0.0, 7, 5)
    assert auroc(-rising, labels) == detection.Auroc(0.0, 0.0, 7, 5)
    assert auroc(torch.zeros(12), labels).value == 0.5


def test_standard_error_is_that_of_delong():
    scores, labels = draws(4, 50, rounded=True)
    positive, negative = scores[labels], scores[~labels]
    wins = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative)
    variance = wins.mean(1).var() / len(positive) + wins.mean(0).var() / len(negative)
    assert auroc(scores, labels).standard_error == pytest.approx(float(variance.sqrt()), rel=1e-12)


def test_standard_error_with_groups_is_that_of_resampling_groups():
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(150).repeat_interleave(4)
    shared = torch.randn(150, generator=generator, dtype=torch.float64)[groups]
    labels = torch.rand(600, generator=generator) < 0.5
    scores = shared + 0.5 * torch.randn(600, generator=generator, dtype=torch.float64) + 0.7 * labels
    result = auroc(scores, labels, groups)
    areas = []
    for _ in range(500):
        weights = torch.bincount(torch.randint(150, (150,), generator=generator), minlength=150)[groups]
        areas.append(roc_auc_score(labels, scores, sample_weight=weights))
    assert result.standard_error == pytest.approx(np.std(areas), rel=0.1)
    repeated = auroc(scores.repeat(2), labels.repeat(2), groups.repeat(2))
    assert repeated.value == pytest.approx(result.value, abs=1e-12)
    assert repeated.standard_error == pytest.approx(result.standard_error, rel=1e-9), "copies add no information"
    assert auroc(scores.repeat(2), labels.repeat(2)).standard_error < 0.8 * repeated.standard_error


def test_standard_error_of_one_group_is_unknown():
    scores, labels = draws(1, 20)
    assert np.isnan(auroc(scores, labels, torch.zeros(20, dtype=torch.int64)).standard_error)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(2, 80), rounded=st.booleans())
def test_calibration_is_monotone_within_bounds_and_right_on_its_training_data(seed, count, rounded):
    scores, labels = draws(seed, count, rounded=rounded)
    calibration = Calibration.fit(scores, labels)
    risks = calibration.risk(scores)
    assert risks.mean() == pytest.approx(float(labels.double().mean()), abs=1e-9)
    for level in risks.unique():  # each level of the fit is the share of positives at it
        assert labels[(risks - level).abs() < 1e-12].double().mean() == pytest.approx(float(level), abs=1e-9)
    assert detection.expected_calibration_error(risks, labels) < 1e-9
    line = calibration.risk(torch.linspace(-1e3, 1e3, 4001, dtype=torch.float64))
    assert (line.diff() >= 0).all()
    assert line.min() >= 0
    assert line.max() <= 1
    assert calibration.risk(float("-inf")) == calibration.risks[0]
    assert calibration.risk(float("inf")) == calibration.risks[-1]
    middle = (calibration.scores[1:] + calibration.scores[:-1]) / 2
    torch.testing.assert_close(calibration.risk(middle), (calibration.risks[1:] + calibration.risks[:-1]) / 2)


def test_calibration_minimises_the_squared_error_among_monotone_maps():
    scores, labels = draws(7, 40)
    error = (Calibration.fit(scores, labels).risk(scores) - labels.double()).square().sum()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        rival = Calibration(
            scores.sort().values, torch.rand(40, generator=generator, dtype=torch.float64).sort().values
        )
        assert (rival.risk(scores) - labels.double()).square().sum() >= error


def test_calibration_survives_an_artifact_and_refuses_a_corrupt_one():
    calibration = Calibration.fit(*draws(3, 60))
    again = Calibration.from_arrays({"mask": torch.ones(3)} | calibration.arrays())
    assert torch.equal(again.scores, calibration.scores)
    assert torch.equal(again.risks, calibration.risks)
    assert Calibration.from_arrays({"mask": torch.ones(3)}) is None
    arrays = calibration.arrays()
    for name, value in [
        ("calibration.scores", arrays["calibration.scores"].flip(0)),
        ("calibration.risks", arrays["calibration.risks"] + 1),
        ("calibration.risks", arrays["calibration.risks"][1:]),
        ("calibration.risks", torch.full_like(arrays["calibration.risks"], float("nan"))),
    ]:
        with pytest.raises(ArtifactError, match="calibration is corrupt"):
            Calibration.from_arrays(arrays | {name: value})


def test_one_knot_is_a_constant():
    calibration = Calibration(torch.tensor([2.0]), torch.tensor([0.25]))
    assert calibration.risk(torch.tensor([[-1.0, 2.0, 9.0]])).tolist() == [[0.25, 0.25, 0.25]]


def test_expected_calibration_error_by_hand():
    risks = torch.tensor([0.1, 0.1, 0.9, 1.0])
    labels = torch.tensor([True, False, True, True])
    assert detection.expected_calibration_error(risks, labels, bins=2) == pytest.approx((0.4 * 2 + 0.05 * 2) / 4)


@pytest.mark.parametrize("function", [auroc, Calibration.fit])
def test_bad_scores_and_labels(function):
    with pytest.raises(InputError, match=r"scores\[1\] is not finite"):
        function(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
    with pytest.raises(InputError, match="both labels"):
        function(torch.tensor([1.0, 2.0]), torch.tensor([True, True]))
    with pytest.raises(InputError, match="vectors of one length"):
        function(torch.zeros(3), torch.tensor([True, False]))


def test_answer_scores_by_hand(lm):
    settings = DetectionSettings(samples=3, max_new_tokens=5, temperature=1.0)
    decoded = settings.draw(lm, [[10, 20, 30], [40]], stop_token=list(range(60)))
    scores = detection.answer_scores(decoded, settings)
    logprobs, lengths = decoded.sampled.logprobs.double(), decoded.sampled.lengths
    for p in range(2):
        means = [logprobs[p, k, :n].sum() / max(int(n), 1) for k, n in enumerate(lengths[p])]
        assert scores["length_normalised_entropy"][p] == pytest.approx(-float(np.mean(means)), rel=1e-6)
        greedy = decoded.greedy.logprobs[p, : decoded.greedy.lengths[p]].double()
        assert scores["perplexity"][p] == pytest.approx(float((-greedy.mean()).exp()), rel=1e-6)
        z = decoded.sampled.embeddings[p].double()
        centred = z - z.mean(-1, keepdim=True)
        expected = torch.logdet(centred @ centred.T + 1e-3 * torch.eye(3)) / 3
        assert scores["eigenscore"][p] == pytest.approx(float(expected), rel=1e-6)


class WordTokenizer(ByteTokenizer):
    """Reads bytes, but writes a word for each token, so that a model with random weights names entities."""

    words = ("Norfolk", "the", "Kent", "(", "Rome", "of")

    def decode(self, tokens):
        return "".join(f" {self.words[token % 6]}" for token in tokens)


def test_study_judges_the_greedy_continuation_and_keeps_the_end_of_long_prompts(lm):
    tokenizer, settings = WordTokenizer(), DetectionSettings(samples=2, max_new_tokens=6)
    cases = detection.cloze_cases(json_lines("send", "wiki_test"))[:40]
    assert max(len(case.prompt) for case in cases) > 96, "some prompts are longer than the model's positions"
    expected = []
    for i, case in enumerate(cases):
        prompt = tokenizer.encode([case.prompt])[0][-(96 - 6) :]
        answer = sample(lm, [prompt], samples=2, max_new_tokens=6).greedy.token_lists()[0]
        said = tokenizer.decode(answer)
        entity = said.split()[0] if i % 2 and said else case.entity
        cases[i] = detection.ClozeCase(case.passage, case.prompt, entity)
        expected.append(hallucinated(said, entity, ended=len(answer) < 6))
    assert set(expected) == {True, False, None}
    study = detection.cloze_study(lm, tokenizer, cases, settings, batch_size=7)
    decided = [i for i, label in enumerate(expected) if label is not None]
    assert study.labels.tolist() == [expected[i] for i in decided]
    assert study.groups.tolist() == [cases[i].passage for i in decided]
    assert study.cases == 40
    assert all(len(values) == len(decided) for values in study.scores.values())


def test_study_statistics_and_merging():
    def part(labels, groups, shift):
        scores = torch.tensor(labels).double() + shift
        return detection.ClozeStudy(torch.tensor(labels), torch.tensor(groups), {"eigenscore": scores}, 2 * len(labels))

    first, second = part([True, False, True], [0, 0, 1], 0.0), part([False, False], [2, 3], 0.5)
    study = detection.ClozeStudy.merged([first, second])
    assert study.cases == 10
    assert study.accuracy == 0.3
    assert study.auroc() == auroc(study.scores["eigenscore"], study.labels, study.groups)
    assert study.auroc().value == 1.0


def test_study_without_cases(lm):
    with pytest.raises(InputError, match="no cloze cases"):
        detection.cloze_study(lm, ByteTokenizer(), [])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_halueval_rows(tmp_path, name):
    rows = [
        {"id": "1", "user_query": "Où?", "response": "Là.", "hallucinated": False, "spans": []},
        {"id": "2", "user_query": "Who?", "response": "Me.", "hallucinated": True, "spans": ["Me"]},
    ]
    path = tmp_path / name

    def write(lines):
        with (gzip.open if name.endswith("gz") else open)(path, "wt", encoding="utf-8") as stream:
            stream.write("\n".join(lines))

    write(map(json.dumps, rows))
    read = detection.read_halueval(path)
    assert [(row.user_query, row.hallucinated) for row in read] == [("Où?", False), ("Who?", True)]
    write([json.dumps(rows[0]), json.dumps(rows[1] | {"hallucinated": "yes"})])
    with pytest.raises(InputError, match="line 2: hallucinated is missing or is no bool"):
        detection.read_halueval(path)
    write([json.dumps(rows[0]), "{"])
    with pytest.raises(InputError, match="line 2: not JSON"):
        detection.read_halueval(path)
    write([])
    with pytest.raises(InputError, match="holds no rows"):
        detection.read_halueval(path)
    path.write_bytes(b"\x1f\x8b\x00\xff")
    with pytest.raises(InputError, match="cannot be read"):
        detection.read_halueval(path)
    with pytest.raises(InputError, match="cannot be read"):
        detection.read_halueval(tmp_path / "absent.jsonl")
