"""Bytes that a worker of each engine holds and sends, from the measured model: what `jobs.engines` configures.

With P learning weights, F frozen ones, N workers, k moments per weight, and b bytes per weight in the forward pass
(4 in fp32, 2 in bf16):

engine  weights               gradients  optimiser      buffers
ddp     4 (P + F)             4 P        4 k P
fsdp    4 (P + F) / N         4 P / N *  4 k P / N      b (outside blocks + 2 blocks) gathered, 4 (1 block) reduced
zero1   b (P + F) + 4 P / N   b P        4 k P / N      two buckets
zero2   b (P + F) + 4 P / N   b P / N    4 k P / N      two buckets
zero3   b (P + F) / N + 4 P/N b P / N    4 k P / N      one bucket, at most LIVE weights gathered

* 4 P where a step has several micro-batches: until the last one reduces them, fsdp's gradients are whole and in fp32.

A ring sends (N - 1) / N of a tensor to gather or to reduce it and twice that to all-reduce it; S is the number of
micro-batches per step, and O the weights outside blocks:

ddp     2 * 4 P               once per step
fsdp    S b (2 P - O) + 4 P   blocks are gathered for forward and backward, the rest once; reduced in fp32 at the last
zero1   2 b P + b P           all-reduced once, gathered after the step
zero2   S * 2 b P + b P       all-reduced at every micro-batch, gathered after the step
zero3   3 S b P               gathered twice and reduced at every micro-batch

ZeRO-1 and ZeRO-2 all-reduce gradients of which a worker keeps its part: DeepSpeed's default, for few and large messages
(`use_multi_rank_bucket_allreduce`).
"""

from dataclasses import dataclass

from jobs.engines import EngineName
from jobs.plan_measure import Measured
from jobs.training import TrainingJob

ENGINES: tuple[EngineName, ...] = ("ddp", "fsdp", "zero1", "zero2", "zero3")
BUCKET = {True: 500_000_000, False: 50_000_000}  # weights, on GPUs and CPUs; `engines._zero_config`
LIVE = 1_000_000_000  # weights that ZeRO-3 keeps gathered at most, DeepSpeed's default
FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker. `snapshot` is the copy that is written in the background, in the host's memory."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    snapshot: float

    def device(self, *, gpu: bool) -> float:
        """The peak on the device: on a CPU the snapshot is in the same memory."""
        held = self.weights + self.gradients + self.optimizer + self.buffers + self.activations
        return held if gpu else held + self.snapshot


def memory(
    job: TrainingJob, found: Measured, engine: EngineName, workers: int, micro_batch: int, passes: int
) -> Memory:
    """What a worker holds with this engine when `micro_batch` samples go through it at once, `passes` times a step."""
    narrow = 2 if job.precision == "bf16" else FP32
    learning = found.learning
    gpu = job.scaling.gpu
    share = 1 if engine == "ddp" else workers
    moments = FP32 * found.moments * learning / share
    activations = found.activations(micro_batch)
    if engine == "ddp":
        weights, gradients, buffers = FP32 * found.parameters, FP32 * learning, 0.0
    else:
        if narrow < FP32:  # autocast's copies of the weights, which only ddp makes
            activations -= min(found.activations.fixed, narrow * found.parameters)
        buckets = narrow * BUCKET[gpu] * (2 if gpu and engine != "zero3" else 1)  # two when they overlap with computing
        masters = FP32 * learning / workers
        weights, gradients, buffers = {
            "fsdp": (
                FP32 * found.parameters / workers,
                FP32 * learning / (workers if passes == 1 else 1),
                narrow * (found.outside + 2 * found.largest) + FP32 * found.largest,
            ),
            "zero1": (narrow * found.parameters + masters, narrow * learning, buckets),
            "zero2": (narrow * found.parameters + masters, narrow * learning / workers, buckets),
            "zero3": (
                narrow * found.parameters / workers + masters,
                narrow * learning / workers,
                buckets + narrow * min(LIVE, found.parameters),
            ),
        }[engine]
    return Memory(
        weights=weights + found.buffers,
        gradients=gradients,
        optimizer=moments,
        buffers=buffers,
        activations=activations,
        snapshot=checkpoint(found) / workers,
    )


def checkpoint(found: Measured) -> float:
    """Bytes of a checkpoint over all workers: weights and moments in fp32, whatever the engine, and the buffers."""
    return FP32 * (found.parameters + found.moments * found.learning) + found.buffers


def sent(job: TrainingJob, found: Measured, engine: EngineName, workers: int, passes: int) -> float:
    """Bytes that a worker sends in one step of `passes` micro-batches."""
    narrow = 2 if job.precision == "bf16" else FP32
    weights = found.learning
    whole = {
        "ddp": 2 * FP32 * weights,
        "fsdp": passes * narrow * (2 * found.parameters - found.outside) + FP32 * weights,
        "zero1": 3 * narrow * weights,
        "zero2": (2 * passes + 1) * narrow * weights,
        "zero3": passes * (2 * narrow * found.parameters + narrow * weights),
    }[engine]
    return whole * (workers - 1) / workers
