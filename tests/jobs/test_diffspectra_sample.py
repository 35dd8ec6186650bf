"""Many spectra on Ray Data: answers that depend on nothing else, runs that go on, and files of people."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rdkit import Chem

from jobs.diffspectra_sample import Answerer, DiffSpectraSampleJob
from library.artifact import open_artifact
from library.diffspectra.answers import answer_molecules, evaluated, sdf_blocks, structure_of
from library.diffspectra.data import load_molecules
from library.diffspectra.denoiser import DenoiserSettings
from library.diffspectra.entries import read_entries
from library.diffspectra.evaluation import evaluate
from library.diffspectra.generation import Elucidator, Found
from library.diffspectra.lines import grid
from library.diffspectra.ranking import rank
from library.diffspectra.recipe import DiffSpectraRecipe
from library.diffspectra.sampling import Sampling
from library.diffspectra.specformer import SpecFormerSettings
from library.errors import InputError, PrismError
from library.recipe import fit

ENCODER = SpecFormerSettings(
    patch_length=(100, 500, 500), stride=(50, 250, 250), width=8, heads=2, layers=1, features=16
)
RECIPE = DiffSpectraRecipe(
    encoder=ENCODER,
    denoiser=DenoiserSettings(width=24, pair_width=6, heads=4, blocks=2, condition=16),
    most_atoms=8,
    batch_size=4,
    steps=1,
)
SAMPLING = Sampling(samples=2, steps=3, seed=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(fit(RECIPE, path=tmp_path_factory.mktemp("model") / "a", device="cpu").path)


def job(model: str, out: Path, **changes: Any) -> DiffSpectraSampleJob:
    told = {"limit": 5, "block": 2, "sampling": SAMPLING, "at": (1, 2), "concurrency": 1}
    return DiffSpectraSampleJob(model=model, out=str(out), **(told | changes))


class Right:
    """An elucidator that knows the answers: of two samples the second is right."""

    def __init__(self, elucidator: Elucidator) -> None:
        self.elucidator, self.data = elucidator, load_molecules()

    def queries(self, *told: Any, **more: Any) -> list[Any]:
        return self.elucidator.queries(*told, **more)

    def find(self, queries: list[Any], sampling: Sampling) -> list[Found]:
        found = []
        for query in queries:
            right = self.data.atoms.structure(query.key)
            samples = [self.data.atoms.structure(0), right]
            ranking = rank(samples)
            found.append(Found(ranking.candidates, ranking.failures, samples, None, ("ir",), ()))
        return found


def test_answers_survive_being_plain_and_are_evaluated_as_samples_are(model: str) -> None:
    right, data = Right(Elucidator.from_artifact(open_artifact(model))), load_molecules()
    numbers = data.part("test").numbers[:3].tolist()
    answers = json.loads(json.dumps(answer_molecules(right, data, numbers, SAMPLING, told="atoms", keep=5)))
    truths = {i: data.atoms.structure(number) for i, number in enumerate(numbers)}
    samples = {i: [data.atoms.structure(0), truth] for i, truth in truths.items()}
    found = evaluated(dict(enumerate(answers)), (1, 2))
    expected = evaluate(truths, samples, at=(1, 2))
    assert found.metrics == pytest.approx(expected.metrics, nan_ok=True)
    assert found.metrics["constitution@2"] == 1.0
    for answer, truth in zip(answers, truths.values(), strict=True):
        again = structure_of(answer["candidates"][1])
        assert (again.bonds == truth.bonds).all()
        assert (again.positions - truth.positions).abs().max() < 1e-4
    supplier = Chem.SDMolSupplier()
    supplier.SetData("".join(sdf_blocks(answers)), removeHs=False)
    mols = list(supplier)
    assert [mol.GetProp("rank") for mol in mols] == ["1", "2"] * 3
    assert [Chem.MolToSmiles(Chem.RemoveHs(mol), isomericSmiles=False) for mol in mols[1::2]] == [
        answer["truth"] for answer in answers
    ]


def test_files_of_spectra_are_read_alike(tmp_path: Path) -> None:
    x, y = [500.0, 1700.0, 1720.0, 4000.0], [0.0, 0.0, 1.0, 0.0]
    entry = {"name": "a", "spectra": {"ir": {"x": x, "y": y, "values": "absorbance"}}, "atoms": 4}
    rows = pd.DataFrame({"molecule": "a", "modality": "ir", "x": x, "y": y, "values": "absorbance", "atoms": 4})
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    (tmp_path / "a.jsonl").write_text(json.dumps(entry) + "\n")
    rows.to_csv(tmp_path / "a.csv", index=False)
    rows.to_parquet(tmp_path / "a.parquet")
    for kind in ("json", "jsonl", "csv", "parquet"):
        with (tmp_path / f"a.{kind}").open("rb") as stream:
            assert read_entries(stream, f"a.{kind}") == [entry]
    for name, text, message in (
        ("b.txt", "", "ends in none of"),
        ("b.json", "{", "b.json cannot be read"),
        ("b.json", "[]", "holds no molecules"),
        ("b.json", '{"name": "a"}', "holds no list"),
        ("b.json", "[{}]", "molecule 1 has no name"),
        ("b.json", '[{"name": "a"}, {"name": "a"}]', "molecule 2 has no name of its own, 'a' is taken"),
        ("b.csv", "molecule,x\na,1\n", "no column 'modality'"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message), (tmp_path / name).open("rb") as stream:
            read_entries(stream, name)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "ready_registry")
def test_blocks_are_answered_once_and_put_together(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = job(model, out).run()
    assert report.metrics["spectra"] == report.metrics["molecules"] == 5
    assert report.metrics["samples"] == 10
    blocks = sorted((out / "blocks").iterdir())
    assert [block.name for block in blocks] == [f"block-{i:06d}.json" for i in range(3)]
    data = load_molecules().limited(most_atoms=8)
    elucidator = Elucidator.from_artifact(open_artifact(model))
    told = {"told": "atoms", "keep": 10}
    expected = answer_molecules(elucidator, data, data.part("test").numbers[2:4].tolist(), SAMPLING, **told)
    got = json.loads(blocks[1].read_text())
    assert [one["judged"] for one in got] == json.loads(json.dumps([one["judged"] for one in expected]))
    assert len(pd.read_parquet(out / "candidates.parquet")) == sum(len(a["candidates"]) for a in map(dict, got)) + sum(
        len(answer["candidates"]) for i in (0, 2) for answer in json.loads(blocks[i].read_text())
    )

    kept = blocks[0].stat().st_mtime_ns
    blocks[1].unlink()
    again = job(model, out).run()
    assert again.notes[0] == "2 of 3 blocks were there already"
    assert blocks[0].stat().st_mtime_ns == kept
    assert again.metrics == pytest.approx(report.metrics, nan_ok=True)
    with pytest.raises(InputError, match="holds answers with another told"):
        job(model, out, told="formula").run()

    ir = {"x": grid("ir").tolist()[::4], "y": [1.0] + [0.0] * 875}
    entries = [
        {"name": "fine", "spectra": {"ir": ir}, "formula": "CH4"},
        {"name": "empty", "spectra": {"ir": ir | {"y": [0.0] * 876}}},
        {"name": "odd", "spectra": {"nmr": ir}},
        {"name": "wrong", "spectra": {"ir": {"y": "?"}}},
    ]
    (tmp_path / "own.json").write_text(json.dumps(entries))
    asked = job(model, tmp_path / "own", source=str(tmp_path / "own.json"), limit=None)
    own = asked.run()
    assert own.metrics["unreadable"] == 3
    assert own.metrics["samples"] == 2
    assert "constitution" not in own.metrics
    [_, note] = own.notes
    assert note.startswith("3 spectra were not read, such as empty: ir: the spectrum is zero everywhere")
    written = (tmp_path / "own" / "blocks" / "block-000000.json").read_bytes()
    corrected = [entries[0] | {"formula": "C2H6"}, *entries[1:]]
    for changed in (corrected, [*entries, {"name": "new", "spectra": {"ir": ir}}], entries[1:]):
        (tmp_path / "own.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match="holds answers with another content"):
            asked.run()
    assert (tmp_path / "own" / "blocks" / "block-000000.json").read_bytes() == written


def test_a_model_that_moved_on_since_the_run_began_answers_nothing(model: str, tmp_path: Path) -> None:
    block = {"name": "block-000000.json", "first": 0, "items": "[0]"}
    with pytest.raises(PrismError, match="has become another artifact since the run began"):
        Answerer(job(model, tmp_path), "the version before")(block)
    Answerer(job(model, tmp_path), open_artifact(model).version)(block)
    assert [path.name for path in (tmp_path / "blocks").iterdir()] == ["block-000000.json"]
