"""A benchmark as it is kept: `<file>.bench.json`, one flat object beside the file, like the measurement.

Every figure is the median of the repeats; `<field>_low` and `<field>_high` are the smallest and the largest of
them.  After five repeats a sixth would lie outside these one time in three: they show how steady the machine was,
and are not a confidence interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from dither.formats.intervals import Interval, IntervalRecord
from dither.formats.sidecars import Sidecar

SCHEMA_VERSION = 1
SUFFIX = ".bench.json"
_LARGEST_FILE = 2**20  # bytes; a hundred repeats are a few KiB
_AGAIN = "Make it again with `dither bench`."

Speed = Annotated[float, Field(ge=0)]


class Spread(Interval):
    """The median of the repeats, with the smallest and the largest of them."""

    __slots__ = ()
    LEAST, ALWAYS = 0.0, True
    low: float
    high: float


class Benchmark(IntervalRecord):
    """How fast one file ran on one machine; speeds in tokens per second, times in seconds."""

    schema_version: int = SCHEMA_VERSION
    tool: str  # "dither 0.1.0"
    engine: str  # "llama.cpp b1234"
    command: str  # what to type to repeat it

    file: str  # name without its folder
    file_bytes: NonNegativeInt  # of all its parts
    file_modified_ns: int  # of the file named; with the size, tells whether it is still the same
    type: str = ""  # the preset's name where the file says so: "Q4_K_M"

    cpu: str
    cores: PositiveInt
    threads: PositiveInt
    context: PositiveInt
    prompt_tokens: PositiveInt
    generated_tokens: PositiveInt
    repeats: PositiveInt

    prefill_tokens_per_second: Spread  # reading the prompt, by the engine's clock
    decode_tokens_per_second: Spread  # writing, as the tokens arrive here: what a person sees
    engine_decode_tokens_per_second: Spread  # writing, by the engine's clock
    time_to_first_token_seconds: Spread
    load_seconds: Speed
    peak_memory_bytes: NonNegativeInt  # of the process that ran it alone
    memory_before_load_bytes: NonNegativeInt  # of that, what the interpreter had before it loaded the model
    joules_per_token: Spread | None = None  # while writing
    energy_note: str  # where the joules were read, or why they were not

    llama_bench_prefill_tokens_per_second: Spread | None = None  # llama.cpp's own benchmark, the same file
    llama_bench_decode_tokens_per_second: Spread | None = None
    llama_bench_note: str = ""

    against: str = ""  # the file that it is compared with, round by round
    prefill_ratio: Spread | None = None  # its speed over the other's: above 1, faster
    decode_ratio: Spread | None = None

    decode_samples: tuple[Speed, ...] = ()
    prefill_samples: tuple[Speed, ...] = ()
    notes: tuple[str, ...] = ()


def spread(samples: Sequence[float]) -> Spread:
    """
    >>> found = spread([3.0, 1.0, 2.0])
    >>> found, found.low, found.high
    (2.0, 1.0, 3.0)
    """
    return Spread(median(samples), min(samples), max(samples))


_KEPT = Sidecar(Benchmark, SUFFIX, SCHEMA_VERSION, "is no benchmark", _LARGEST_FILE, _AGAIN)
path_for, load, parse = _KEPT.path_for, _KEPT.load, _KEPT.parse
save, check_writable = _KEPT.save, _KEPT.check_writable
