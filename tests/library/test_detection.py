"""Detection: labels on real passages, and the study of a model's answers."""

import gzip
import json

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from library.calibration import auroc
from library.errors import InputError
from library.language.tokens import ByteTokenizer
from library.samples import json_lines
from library.send import detection
from library.send.decode import sample
from library.send.detection import DetectionSettings, hallucinated


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


def test_documents_without_titles_give_the_cases_of_their_sentences():
    rows = detection.plain_passages(["He grew up in Norfolk. Was it in Kent? No! He went to Rome.", "   "])
    assert rows[0]["sentences"] == ["He grew up in Norfolk.", "Was it in Kent?", "No!", "He went to Rome."]
    assert [case.entity for case in detection.cloze_cases(rows, min_words=3)] == ["Norfolk.", "Kent?"]
    assert hallucinated(" Norfolk. It", detection.cloze_cases(rows, min_words=3)[0].entity, ended=False) is False
