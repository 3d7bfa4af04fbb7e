"""From bytes to a word: where a file would run, which one to take, with what to run it.

    GPU          everything in the memory of the GPU
    part in RAM  as many layers there as fit, the others computed from the machine's memory
    RAM          no GPU: everything in the machine's memory
    from disk    what must stay in memory fits, the weights do not: they are read again for every token
    no           not even that

llama.cpp keeps the token embedding in the machine's memory, whatever is offloaded: only where it is the
output matrix too does a GPU get a copy of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from dither.capacity.machine import Machine
from dither.capacity.memory import GPU_RUNTIME, Memory, margin
from dither.capacity.speed import CPU_LAYER, GPU_LAYER, SAMPLING, SpeedEstimate, decode_speed

GPU, PARTLY, RAM, DISK, NO = "GPU", "part in RAM", "RAM", "from disk", "no"
FITS = (GPU, PARTLY, RAM)  # the fastest first
READING = 10.0  # tokens per second: a little faster than people read


@dataclass(frozen=True)
class Load:
    """What running one type of the model takes of a machine."""

    memory: Memory
    layers: int
    active: int  # bytes of weights read per token
    vocabulary: int
    embedding: int  # bytes of a token embedding that is no output matrix


@dataclass(frozen=True)
class Verdict:
    word: str
    gpu_layers: int | None  # layers on the GPU where there is one
    speed: SpeedEstimate | None
    why_no_speed: str = ""


def judge(load: Load, machine: Machine) -> Verdict:
    """Where it runs best, and how fast tokens come there."""
    memory = load.memory
    ram = usable(machine)
    cards = machine.vram - sum(margin(gpu.bytes) for gpu in machine.gpus)
    per_gpu = 0 if machine.unified else GPU_RUNTIME * len(machine.gpus)
    on_gpu = memory.total - load.embedding - memory.overhead + per_gpu
    if machine.gpus and on_gpu <= cards and (machine.unified or load.embedding + memory.overhead <= ram):
        return Verdict(GPU, load.layers, *_speed(load, machine, 1.0))
    if machine.gpus and not machine.unified:
        moved = memory.weights - load.embedding + memory.cache
        share = max(0.0, (cards - per_gpu - memory.compute) / moved) if moved else 0.0
        layers = int(load.layers * min(1.0, share))
        left = memory.total - moved * layers / load.layers
        if layers and left <= ram:
            return Verdict(PARTLY, layers, *_speed(load, machine, layers / load.layers))
    if memory.total <= ram:
        return Verdict(RAM, 0 if machine.gpus else None, *_speed(load, machine, 0.0))
    if memory.total - memory.weights <= ram:
        return Verdict(DISK, 0 if machine.gpus else None, None, "the disk decides")
    return Verdict(NO, None, None, "it does not run")


def usable(machine: Machine) -> int:
    """Bytes of the machine's memory that a model may take: what is free, less a margin for others."""
    room = machine.memory.bytes if machine.free is None else min(machine.free, machine.memory.bytes)
    return max(0, room - margin(machine.memory.bytes))


def _speed(load: Load, machine: Machine, on_gpu: float) -> tuple[SpeedEstimate | None, str]:
    """The estimate where `on_gpu` of the layers are on the GPU, or the reason for having none."""
    read = load.active + load.memory.cache / 2
    gpu = machine.gpus[0].bandwidth if machine.gpus else None
    reads = []
    for share, bandwidth, name in ((on_gpu, gpu, "the GPU"), (1 - on_gpu, machine.memory.bandwidth, "the memory")):
        if share and not bandwidth:
            return None, f"the bandwidth of {name} is not known"
        if share and bandwidth:
            reads.append((round(read * share), bandwidth))
    layers = load.layers * (on_gpu * GPU_LAYER + (1 - on_gpu) * CPU_LAYER)
    return decode_speed(reads, layers + load.vocabulary * SAMPLING), ""


@dataclass(frozen=True)
class EngineAdvice:
    """Which format to make for a purpose, and which engine runs it; `suits`: this machine is made for that."""

    purpose: str
    format: str
    engine: str
    reason: str
    suits: bool


def engine_advice(machine: Machine) -> list[EngineAdvice]:
    """Which format for which work, the ones that suit this machine first."""
    card = any(gpu.name and not machine.unified for gpu in machine.gpus)
    large = any(gpu.bytes >= 20 * 2**30 for gpu in machine.gpus) and card
    where = "this processor"
    if card or machine.unified:
        where = "Apple's GPU" if machine.unified else "this GPU, with layers in RAM where it must"
    listed = [
        EngineAdvice("run it here", "GGUF", "llama.cpp", f"runs on {where}", True),
        EngineAdvice(
            "serve many at once",
            "AWQ, GPTQ or compressed-tensors",
            "vLLM",
            "batches requests on a GPU server" if large else "needs a GPU that holds the whole model",
            large,
        ),
        EngineAdvice(
            "fine-tune",
            "bitsandbytes NF4",
            "transformers and PEFT (QLoRA)",
            "trains adapters on frozen 4-bit weights" if card else "needs a CUDA GPU for training",
            card,
        ),
    ]
    return sorted(listed, key=lambda engine: not engine.suits)
