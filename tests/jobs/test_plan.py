"""Plans against what is there: parameters, bytes that really are alive, operations, and what the engines hold."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import prism
from jobs import engines, plan_memory
from jobs.hawq import ClassifierJob
from jobs.plan import plan
from jobs.plan_command import papers, suite, trainings
from jobs.plan_devices import DEVICES, Device, device
from jobs.plan_measure import Line, Measured, language_model, measure, peak_bytes
from jobs.rqgnn import RqgnnJob
from jobs.send import SendJob
from jobs.training import Scaling
from library.errors import InputError
from library.images.recipe import ClassifierRecipe
from library.language import pythia
from library.recipe import make_batch, seeded_model
from library.rqgnn.recipe import RqgnnRecipe
from library.send.recipe import SendRecipe
from tests.jobs.toy import ToyRecipe, run_workers

TINY = SendRecipe(lm="pythia-tiny", corpus="truthfulqa", tokenizer="bytes", context=64, batch_size=8, prompts=0)
GIB = 2**30


def measured(**changes: object) -> Measured:
    """A model of a million weights whose samples cost a mebibyte each."""
    values = {
        "parameters": 1_000_000,
        "learning": 1_000_000,
        "buffers": 0,
        "moments": 2.0,
        "largest": 100_000,
        "outside": 200_000,
        "activations": Line(0, 2**20),
        "flops": Line(0, 1e9),
        "on_data": False,
    }
    return Measured(**(values | changes))


def job(workers: int = 1, *, gpu: bool = True, **changes: object) -> SendJob:
    return SendJob(recipe=TINY, scaling=Scaling(workers=workers, gpu=gpu), **changes)


@pytest.mark.parametrize("size", [name for name in pythia.SIZES if name != "pythia-tiny"])
def test_the_suites_models_have_the_published_parameters(size: str) -> None:
    with FakeTensorMode():
        model = language_model(SendRecipe.pretraining(size))
        assert sum(p.numel() for p in model.parameters()) == pythia.SIZES[size].parameters()


def test_a_language_model_without_values_costs_what_a_real_one_does() -> None:
    found = measure(SendJob(recipe=TINY))
    model = seeded_model(TINY)
    splits = TINY.datasets()
    samples = 6
    peak, flops = peak_bytes(TINY, model, make_batch(splits, splits.train, range(samples), range(samples)))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.buffers == pytest.approx(sum(b.nbytes for b in model.buffers()), abs=2**20)
    assert found.activations(samples) == pytest.approx(peak, rel=0.03)
    assert found.flops(samples) == pytest.approx(flops, rel=1e-6)
    assert found.moments == 2  # AdamW's
    tokens = samples * TINY.context
    assert found.flops(samples) == pytest.approx(TINY.flops_per_unit(model) * tokens, rel=0.02)


def test_an_image_network_without_values_costs_what_a_real_one_does() -> None:
    recipe = ClassifierRecipe(network="resnet20", batch_size=8)
    found = measure(ClassifierJob(recipe=recipe))
    model, splits = seeded_model(recipe), recipe.datasets()
    peak, flops = peak_bytes(recipe, model, make_batch(splits, splits.train, range(8), range(8)))
    assert not found.on_data
    assert found.activations(8) == pytest.approx(peak, rel=0.05)
    assert found.flops(8) == flops
    assert found.moments == 1  # SGD with momentum


def test_graphs_are_measured_on_samples() -> None:
    recipe = RqgnnRecipe(batch_size=8)
    found = measure(RqgnnJob(recipe=recipe))
    assert found.on_data
    assert found.parameters == sum(p.numel() for p in seeded_model(recipe).parameters())
    assert "a few real samples" in plan(RqgnnJob(recipe=recipe), DEVICES["t4"], found=found).assumptions()[0]


def test_narrow_arithmetic_and_recomputing_keep_less() -> None:
    full, narrow = measure(SendJob(recipe=TINY)), measure(SendJob(recipe=TINY, precision="bf16"))
    again = measure(SendJob(recipe=TINY, activation_checkpointing=True))
    assert narrow.activations.each < full.activations.each
    assert again.activations.each < full.activations.each
    assert full.flops.each < again.flops.each < 1.4 * full.flops.each  # one more forward pass of four


WATCHED = """
import json, os, sys, torch
from jobs.send import SendJob
from library.recipe import seeded_model
from library.send.recipe import SendRecipe
recipe = SendRecipe.model_validate_json(sys.argv[1])
model = seeded_model(recipe)
optimizer = recipe.optimizer(model)
ids = torch.randint(257, (recipe.batch_size, recipe.context))
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
recipe.losses(model, {"input_ids": ids[:1, :8], "targets": ids[:1, :8]})["loss"].backward()  # libraries are loaded
optimizer.zero_grad()
base = resident() - sum(p.nbytes for p in model.parameters()) - sum(b.nbytes for b in model.buffers())
for _ in range(2):
    recipe.losses(model, {"input_ids": ids, "targets": ids})["loss"].backward()
    optimizer.step()
    for p in model.parameters():
        p.grad.zero_()  # as the buckets of DDP, which stay
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))  # getrusage has the parent's
print(json.dumps(int(peak.split()[1]) * 1024 - base))
"""


def test_the_memory_of_a_training_is_what_a_process_takes() -> None:
    """The process's own peak, beside what it took before there was a model."""
    recipe = SendRecipe(lm="pythia-31m", corpus="truthfulqa", tokenizer="bytes", context=256, batch_size=16, prompts=0)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, recipe.model_dump_json()],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed goes back at once
        capture_output=True,
        text=True,
        check=True,
    )
    planned = SendJob(recipe=recipe)
    held = plan_memory.memory(planned, measure(planned), "ddp", 1, recipe.batch_size, 1)
    assert held.device(gpu=True) == pytest.approx(json.loads(done.stdout.splitlines()[-1]), rel=0.15)


@pytest.mark.parametrize("engine", plan_memory.ENGINES)
def test_an_engine_holds_what_is_planned(
    engine: engines.EngineName, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, gradients and moments that are alive after a step, on one worker."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
    planned = SendJob(recipe=TINY, engine=engine)
    ids = torch.ones(2, TINY.context, dtype=torch.int64)
    found = measure(planned)
    gc.collect()
    before = alive()
    wrapped = engines.prepare(engine, TINY, seeded_model(TINY), device=torch.device("cpu"))
    for _ in range(2):
        wrapped.begin(last=True)
        wrapped.backward(TINY.losses(wrapped.model, {"input_ids": ids, "targets": ids})["loss"])
        if engine == "ddp":
            gradients = alive() - before
        wrapped.step()
    gc.collect()
    held = plan_memory.memory(planned, found, engine, 1, 2, 1)
    kept = alive() - before
    state = held.weights + held.optimizer
    assert 0.95 * state <= kept <= 1.05 * (state + held.gradients + held.buffers)
    if engine == "ddp":
        assert gradients == pytest.approx(state + held.gradients, rel=0.05)


def alive() -> int:
    """Bytes of all tensors that Python holds, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and type(thing).__name__ in ("Tensor", "Parameter", "Buffer"):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def test_sharding_divides_what_it_shards() -> None:
    found, asked = measured(), job()
    one = {engine: plan_memory.memory(asked, found, engine, 1, 1, 1) for engine in plan_memory.ENGINES}
    many = {engine: plan_memory.memory(asked, found, engine, 8, 1, 1) for engine in plan_memory.ENGINES}
    weights = 4e6
    assert one["ddp"] == many["ddp"].__class__(**(vars(many["ddp"]) | {"snapshot": one["ddp"].snapshot}))
    assert one["ddp"].weights == one["ddp"].gradients == one["ddp"].optimizer / 2 == weights
    assert many["fsdp"].weights == many["fsdp"].gradients == many["fsdp"].optimizer / 2 == weights / 8
    assert plan_memory.memory(asked, found, "fsdp", 8, 1, 2).gradients == weights  # whole until the last micro-batch
    assert many["zero1"].gradients == weights
    assert many["zero2"].gradients == weights / 8
    assert many["zero1"].weights == many["zero2"].weights == weights * (1 + 1 / 8)
    assert many["zero3"].weights == 2 * weights / 8
    assert plan_memory.checkpoint(found) == 3 * weights
    assert many["zero3"].snapshot == 3 * weights / 8


def test_a_ring_sends_nothing_alone_and_twice_the_gradients_among_many() -> None:
    found = measured()
    for engine in plan_memory.ENGINES:
        assert plan_memory.sent(job(), found, engine, 1, 4) == 0
    assert plan_memory.sent(job(), found, "ddp", 4, 4) == 2 * 4e6 * 3 / 4
    assert plan_memory.sent(job(precision="bf16"), found, "zero1", 4, 4) == 3 * 2e6 * 3 / 4
    assert plan_memory.sent(job(), found, "zero3", 4, 2) == 2 * plan_memory.sent(job(), found, "zero3", 4, 1)


class Squares(nn.Module):
    """Eight equal matrices, six of which are repeated blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, *layers, self.out = (nn.Linear(256, 256, bias=False) for _ in range(8))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.inp, *self.layers, self.out):
            x = x + torch.tanh(layer(x))
        return x


class SquaresRecipe(ToyRecipe, frozen=True):
    def model(self) -> nn.Module:
        return Squares()


SQUARE = 256 * 256
SQUARES = measured(parameters=8 * SQUARE, learning=8 * SQUARE, largest=SQUARE, outside=2 * SQUARE)
TRIED = [  # the one whose memory is looked at comes first
    ("fsdp", "bf16", 3),
    ("fsdp", "fp32", 1),
    ("ddp", "fp32", 3),
    ("zero1", "bf16", 3),
    ("zero2", "fp32", 1),
    ("zero2", "bf16", 3),
]
TIMES = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "broadcast_": 1}


class Sent(TorchDispatchMode):
    """Counts the bytes that a ring of two sends for torch.distributed's collectives: half a tensor, once or twice."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            whole = max(tensor.nbytes for tensor in tree_leaves(args) if isinstance(tensor, Tensor))
            self.bytes += TIMES[op.overloadpacket.__name__] * whole / 2
        return op(*args, **(kwargs or {}))


def costs() -> list[tuple[float, int]]:
    """What this worker sends in a step, and the bytes that are new before its last backward, for each of TRIED."""
    found = []
    for engine, precision, passes in TRIED:
        recipe = SquaresRecipe()
        wrapped = engines.prepare(engine, recipe, seeded_model(recipe), device=torch.device("cpu"), precision=precision)
        gc.collect()
        before = alive()
        with Sent() as sent:
            for i in range(passes):
                wrapped.begin(last=i == passes - 1)
                loss = wrapped.model(torch.ones(1, 256)).square().mean()
                held = alive() - before
                wrapped.backward(loss)
            wrapped.step()
        found.append((sent.bytes, held))
    return found


def test_two_workers_send_and_keep_what_is_planned() -> None:
    """Collectives as torch runs them, and FSDP's gradients that wait for the last micro-batch of a step."""
    found = run_workers(2, costs)
    for (engine, precision, passes), (sent, _) in zip(TRIED, found, strict=True):
        planned = plan_memory.sent(job(2, precision=precision), SQUARES, engine, 2, passes)
        assert sent == pytest.approx(planned, rel=0.01), (engine, precision, passes)
    gradients = plan_memory.memory(job(2, precision="bf16"), SQUARES, "fsdp", 2, 1, 3).gradients
    assert found[0][1] == pytest.approx(gradients, rel=0.2)  # beside the activations of one sample


def small(gib: float, **changes: float) -> Device:
    return Device("small", 1e12, 1e12, gib * GIB, 8, changes.get("inside", 1e12), 1e12)


def test_the_largest_micro_batch_that_fits_is_taken_and_the_simplest_engine() -> None:
    made = plan(job(2), small(1), found=measured())
    assert (made.best.engine, made.best.micro_batch, made.best.passes) == ("ddp", 4, 1)
    made = plan(job(2), small(0.021), found=measured())  # 15.3 MiB of state beside activations
    assert (made.best.engine, made.best.micro_batch, made.best.passes) == ("ddp", 4, 1)
    made = plan(job(2), small(0.019), found=measured())
    assert (made.best.engine, made.best.micro_batch, made.best.passes) == ("ddp", 2, 2)
    assert made.best.computing == pytest.approx(4 * 1e9 / (0.4 * 1e12))
    assert made.hours == pytest.approx(TINY.steps * made.best.seconds / 3600)
    for one in made.engines:
        assert one.memory == plan_memory.memory(made.job, made.found, one.engine, 2, one.micro_batch, one.passes)
    slow = plan(job(2, precision="bf16"), small(4, inside=1e6), found=measured())  # room for DeepSpeed's buckets
    assert slow.best.engine == "zero1"  # three quarters of the bytes of ddp
    assert slow.best.seconds == slow.best.sending > slow.best.computing


def test_a_model_that_does_not_fit_says_what_would() -> None:
    found = measured(parameters=10**9, learning=10**9, outside=10**7, largest=10**7)
    made = plan(job(1), small(6), found=found)
    assert made.best is made.hours is made.record()["recommended"] is None
    assert made.enough() == ("fsdp", 4)
    assert plan(job(1), small(0.01), found=found).enough() is None


def test_what_a_job_refuses_is_not_recommended() -> None:
    asked = SendJob(recipe=TINY, scaling=Scaling(workers=2, gpu=True), curvature_every=5)
    made = plan(asked, small(1), found=measured())
    assert made.best.engine == "ddp"
    assert all("engine ddp" in one.why for one in made.engines[1:])


def test_devices_and_wrong_questions() -> None:
    for name, one in DEVICES.items():
        assert one.bf16 >= one.fp32 > 1e12, name
        assert one.inside >= one.outside, name
    here = device(None, cpus=1)
    assert here.peak("bf16") == here.peak("fp32")
    assert here.memory * here.node >= GIB
    with pytest.raises(InputError, match=r"--gpu h900: .*a100, h100"):
        device("h900", cpus=1)
    with pytest.raises(InputError, match="less than the 9 workers"):
        plan(job(9), small(1), found=measured())
    with pytest.raises(InputError, match="--efficiency 0"):
        plan(job(), small(1), found=measured(), efficiency=0)
    with pytest.raises(InputError, match="unknown model 'nope'"):
        measure(SendJob(recipe=TINY.model_copy(update={"lm": "nope"})))


def test_the_tables_name_the_suite_and_every_method_that_trains() -> None:
    assert [label for label, _ in suite()] == [name for name in pythia.SIZES if name != "pythia-tiny"]
    settings = dict(papers())
    assert {one.job for one in settings.values()} == set(trainings())
    assert settings["diffspectra"].recipe.steps == 1_000_000


def test_a_plan_as_json_and_as_a_table(capfd: pytest.CaptureFixture[str]) -> None:
    line = "plan rqgnn --batch-size 64 --workers 2 --gpu t4"
    assert prism.main([*line.split(), "--json"]) == 0
    said = capfd.readouterr()
    record = json.loads(said.out)
    assert record["recommended"] == {"engine": "ddp", "micro_batch": 32}
    assert (record["workers"], record["device"]["name"], record["measured_on"]) == (2, "t4", "data")
    assert [one["engine"] for one in record["engines"]] == list(plan_memory.ENGINES)
    assert record["hours"] == pytest.approx(record["step_seconds"] * 400 / 3600)
    for word in ("activations", "copy for a checkpoint", "take --engine ddp", "assumed:"):
        assert word in said.err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("plan", "name a job, as in `prism plan send`; there are pythia, papers, send"),
        ("plan sand", "there is no job 'sand'"),
        ("plan farms", "farms has no training to plan; there are send"),
        ("plan send --gpu h900", "--gpu h900: there is no data on it; there are t4"),
        ("plan send --gpu", "--gpu: name the GPU, as in --gpu h100"),
        ("plan send --steps 0", "--steps: should be greater than 0"),
        ("plan send --efficiency 2", "--efficiency 2"),
        ("plan pythia --workers 0", "--workers 0: at least 1"),
    ],
)
def test_a_wrong_question_gets_one_line(line: str, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert prism.main(line.split()) == 2
    [said] = capfd.readouterr().err.splitlines()
    assert says in said
