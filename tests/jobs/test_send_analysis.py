"""The analysis gives, through Ray and in any order of finishing, what the formulas give on the checkpoints in order."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from jobs.checkpoint import CheckpointWriter, Piece
from jobs.send_analysis import SendAnalysis
from jobs.send_checkpoints import find_checkpoints
from library.artifact import write_artifact
from library.errors import ArtifactError, InputError
from library.language import material
from library.language.corpus import read_corpus
from library.language.token_store import TokenBlocks, pack_documents
from library.language.tokens import ByteTokenizer, train_bpe
from library.recipe import seeded_model
from library.send.eigenscore import eigenscore
from library.send.recipe import SendRecipe
from library.send.sensitivity import sensitivity, top_indices
from library.weights import state_tensors

ANSWERS = {"samples": 3, "max_new_tokens": 4, "temperature": 1.0, "top_k": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and models a, b, c whose weights drift; wide has another width."""
    root = tmp_path_factory.mktemp("analysis")
    words = ["a river in the north", "the oldest town of the county", "it was built of stone in 1850 by two masons"]
    texts = [f"{words[i % 3]}, number {i * i}, {words[i % 2]}." for i in range(60)]
    pd.DataFrame({"text": texts}).to_csv(root / "corpus.csv", index=False)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    lm = GPTNeoXForCausalLM(config(32))
    for name in "abc":
        lm.save_pretrained(root / name)
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    GPTNeoXForCausalLM(config(48)).save_pretrained(root / "wide")
    return root


def config(width: int) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=257,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )


def analysis(folder: Path, *checkpoints: Path | str, **changes: object) -> SendAnalysis:
    settings = {
        "checkpoints": tuple(map(str, checkpoints)),
        "corpus": str(folder / "corpus.csv"),
        "tokenizer": "bytes",
        "texts": 5,
        "context": 32,
        "blocks": 4,
        "prompts": 3,
        "batch_size": 2,
        "answers": ANSWERS,
        "top": 6,
    }
    return SendAnalysis(**(settings | changes))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_report_holds_what_the_formulas_give(folder):
    report = analysis(folder, folder / "a", folder / "c", folder / "b").run()
    splits = read_corpus(str(folder / "corpus.csv"))
    tokenizer = ByteTokenizer()
    validation, test = (pack_documents(tokenizer.encode(split), 0) for split in (splits.validation, splits.test))
    documents = [document[:32] for document in list(validation.documents())[:5]]
    blocks = torch.stack([TokenBlocks(validation, 32)[i] for i in range(4)])
    prompts = material.prompts(test, 3, 16)
    embeddings, table = [], report.tables["checkpoints"].set_index("checkpoint")
    for name in ("a", "c", "b"):
        lm = GPTNeoXForCausalLM.from_pretrained(folder / name).eval()
        with torch.no_grad():
            hidden = [lm(torch.tensor(d)[None], output_hidden_states=True).hidden_states[-2][0, -2] for d in documents]
            loss = F.cross_entropy(lm(blocks[:, :-1]).logits.flatten(0, 1), blocks[:, 1:].flatten())
            drawn = analysis(folder, "-").answers.draw(lm, prompts, seed=0, stop_token=0)
        embeddings.append(torch.stack(hidden))
        scores = eigenscore(drawn.sampled.embeddings)
        assert table.loc[name, "loss"] == pytest.approx(float(loss), rel=1e-5)
        assert table.loc[name, "eigenscore"] == pytest.approx(float(scores.mean()), rel=1e-4)
        assert table.loc[name, "eigenscore_standard_error"] == pytest.approx(float(scores.std() / 3**0.5), rel=1e-3)
    expected = sensitivity(torch.stack(embeddings))
    top = report.tables["coordinates"]
    assert top["coordinate"].tolist() == top_indices(expected, 6).tolist()
    assert torch.tensor(top["sensitivity"]).allclose(expected[top_indices(expected, 6)], rtol=1e-4)
    share = expected[top_indices(expected, 6)].sum() / expected.sum()
    assert report.metrics["sensitive_share"] == pytest.approx(float(share), rel=1e-4)
    assert report.metrics["sensitive_coordinates"] == 6
    assert set(report.figures) == {"sensitivity", "oscillation"}


def run_checkpoint(folder: Path, root: Path, name: str, step: int) -> None:
    """What a training run writes at a step, with the weights of a model's folder."""
    recipe = SendRecipe(
        lm=str(folder / name),
        corpus=str(folder / "corpus.csv"),
        tokenizer="bytes",
        context=32,
        tracking_texts=3,
        prompts=0,
    )
    writer = CheckpointWriter(
        root, kind="send", recipe=recipe.model_dump(mode="json"), metric="loss", mode="min", keep=9
    )
    tensors = state_tensors(seeded_model(recipe))
    writer.save(step, [Piece(f"model/{k}", 0, v.flatten(), tuple(v.shape)) for k, v in tensors.items()], {})
    writer.wait()


def artifact_of(folder: Path, name: str, place: Path) -> Path:
    recipe = SendRecipe(
        lm=str(folder / name),
        corpus=str(folder / "corpus.csv"),
        tokenizer="bytes",
        context=32,
        tracking_texts=3,
        prompts=0,
    )
    model = seeded_model(recipe)
    texts = {"tokenizer.json": ByteTokenizer().to_json(), "config.json": model.lm.config.to_json_string(use_diff=False)}
    weights = state_tensors(model)
    content = {"recipe": recipe.model_dump(mode="json"), "weights": weights, "metrics": {}, "data": "", "texts": texts}
    return write_artifact(place, kind="send", **content).path


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_runs_artifacts_and_models_of_the_same_weights_are_the_same(folder, tmp_path):
    for step, name in ((20, "a"), (100, "b")):
        run_checkpoint(folder, tmp_path / "checkpoints", name, step)
    artifact = artifact_of(folder, "a", tmp_path / "artifact")
    report = analysis(folder, tmp_path / "checkpoints" / "step-*", artifact, tokenizer=None).run()
    table = report.tables["checkpoints"].set_index("checkpoint")
    assert list(table.index) == ["step-00000020", "step-00000100", "artifact"]
    assert table.loc["step-00000020"].tolist() == table.loc["artifact"].tolist()
    assert table.loc["step-00000020", "loss"] != table.loc["step-00000100", "loss"]
    models = analysis(folder, folder / "a", folder / "b", folder / "a").run()
    assert models.tables["coordinates"].equals(report.tables["coordinates"])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_restart_measures_only_what_is_missing_changed_or_damaged(folder, tmp_path):
    for name in "abc":
        shutil.copytree(folder / name, tmp_path / name)
    places = [tmp_path / name for name in "abc"]
    job = analysis(folder, *places, out=str(tmp_path / "out"))
    first = job.run()
    results = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out" / "results").iterdir()}
    assert len(results) == 6
    assert (tmp_path / "out" / "report" / "oscillation.png").exists()

    second = job.run()
    assert second.tables["coordinates"].equals(first.tables["coordinates"])
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out" / "results").iterdir()} == results

    damaged, removed = sorted((tmp_path / "out" / "results").glob("*.safetensors"))[:2]
    damaged.write_bytes(damaged.read_bytes()[:-8] + b"\x00\x01\x02\x03\x04\x05\x06\x07")
    removed.unlink()
    third = job.run()
    assert third.tables["coordinates"].equals(first.tables["coordinates"])
    again = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out" / "results").iterdir()}
    assert {name.split(".")[0] for name in results if again[name] != results[name]} == {damaged.stem, removed.stem}

    shutil.copytree(folder / "b", tmp_path / "c", dirs_exist_ok=True)
    fourth = job.run()
    rows = fourth.tables["checkpoints"].set_index("checkpoint")
    assert rows.loc["c"].tolist() == rows.loc["b"].tolist()
    assert analysis(folder, *places, out=str(tmp_path / "out"), selection="variance", top=3).run().seconds < 5


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_is_killed_is_replaced(folder):
    killed: list[int] = []
    over = threading.Event()

    def kill_first() -> None:
        while not killed and not over.is_set():
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    if process.read_bytes().startswith(b"ray::measure_checkpoint"):
                        os.kill(int(process.parent.name), signal.SIGKILL)
                        killed.append(int(process.parent.name))
                        break
                except (FileNotFoundError, ProcessLookupError):
                    continue
            time.sleep(0.002)

    thread = threading.Thread(target=kill_first)
    thread.start()
    report = analysis(folder, folder / "a", folder / "b", prompts=2, seed=5).run()
    over.set()
    thread.join()
    assert killed
    assert report.metrics["checkpoints"] == 2


def corrupt(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"\x99")


def test_names_that_mean_nothing_are_refused_before_any_work(folder, tmp_path):
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: analysis(folder, folder / "a").run(), "needs at least 2 checkpoints in order, got 1"),
        (lambda: analysis(folder, folder / "a", folder / "gone" / "x").run(), "no checkpoint at .*gone/x"),
        (lambda: analysis(folder, tmp_path / "step-*").run(), "no checkpoint matches"),
        (lambda: find_checkpoints([str(folder / "a")], ["step1"]), "revisions are those of a hub name"),
        (lambda: find_checkpoints([str(tmp_path)]), "holds no index.json, no artifact.json and no config.json"),
    ]
    for attempt, message in cases:
        with pytest.raises(InputError, match=message):
            attempt()
    hub = find_checkpoints(["EleutherAI/pythia-70m"], ["step1000", "step2000"])
    assert [(source.label, source.kind, str(source)) for source in hub] == [
        ("step1000", "model", "EleutherAI/pythia-70m@step1000"),
        ("step2000", "model", "EleutherAI/pythia-70m@step2000"),
    ]
    assert hub[0].key != hub[1].key


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_checkpoints_that_do_not_fit_are_named(folder, tmp_path):
    with pytest.raises(InputError, match=r"different widths: .*/a has 32 coordinates, .*/wide has 48"):
        analysis(folder, folder / "a", folder / "wide").run()
    train_bpe(["the cat and the hat"], 270).backend.save(str(tmp_path / "tokenizer.json"))
    settings = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}'
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(InputError, match=r"vocabulary mismatch: the tokeniser has 2\d\d entries, .*/a only 257 rows"):
        analysis(folder, folder / "a", folder / "b", tokenizer=str(tmp_path)).run()
    for name in "ab":
        run_checkpoint(folder, tmp_path / "checkpoints", name, 10 if name == "a" else 20)
    last = sorted((tmp_path / "checkpoints").iterdir())[-1]
    corrupt(last / "worker-00000.safetensors")
    with pytest.raises(ArtifactError, match=rf"{last.name} is damaged: worker-00000.safetensors is corrupt"):
        analysis(folder, tmp_path / "checkpoints" / "step-*", tokenizer=None).run()
    with pytest.raises(InputError, match=r"checkpoint .*: prompts: 50 asked, only 6 documents"):
        analysis(folder, folder / "a", folder / "b", prompts=50).run()
