"""A benchmark as it is kept: `<file>.bench.json`, one flat object beside the file, like the measurement.

Every figure is the median of the repeats; `<field>_low` and `<field>_high` are the smallest and the
largest of them.  With five repeats that is an interval which a sixth would leave one time in three: it
shows how steady the machine was, and is no confidence interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from dither.formats.sidecars import Sidecar

SCHEMA_VERSION = 1
SUFFIX = ".bench.json"
_LARGEST_FILE = 2**20  # bytes; a hundred repeats are a few KiB
_AGAIN = "Make it again with `dither bench`."

Speed = Annotated[float, Field(ge=0)]


class Benchmark(BaseModel):
    """How fast one file ran on one machine; speeds in tokens per second, times in seconds."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="ignore")

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

    prefill_tokens_per_second: Speed  # reading the prompt, by the engine's clock
    prefill_tokens_per_second_low: Speed
    prefill_tokens_per_second_high: Speed
    decode_tokens_per_second: Speed  # writing, as they arrive here: what a person sees
    decode_tokens_per_second_low: Speed
    decode_tokens_per_second_high: Speed
    engine_decode_tokens_per_second: Speed  # writing, by the engine's clock
    engine_decode_tokens_per_second_low: Speed
    engine_decode_tokens_per_second_high: Speed
    time_to_first_token_seconds: Speed
    time_to_first_token_seconds_low: Speed
    time_to_first_token_seconds_high: Speed
    load_seconds: Speed
    peak_memory_bytes: NonNegativeInt  # of the process that ran it alone
    memory_before_load_bytes: NonNegativeInt  # of that, what the interpreter had before the model came
    joules_per_token: Speed | None = None  # while writing
    joules_per_token_low: Speed | None = None
    joules_per_token_high: Speed | None = None
    energy_note: str  # where the joules are from, or why there are none

    llama_bench_prefill_tokens_per_second: Speed | None = None  # llama.cpp's own benchmark, the same file
    llama_bench_prefill_tokens_per_second_low: Speed | None = None
    llama_bench_prefill_tokens_per_second_high: Speed | None = None
    llama_bench_decode_tokens_per_second: Speed | None = None
    llama_bench_decode_tokens_per_second_low: Speed | None = None
    llama_bench_decode_tokens_per_second_high: Speed | None = None
    llama_bench_note: str = ""

    against: str = ""  # the file that it is compared with, round by round
    prefill_ratio: Speed | None = None  # its speed over the other's: above 1, faster
    prefill_ratio_low: Speed | None = None
    prefill_ratio_high: Speed | None = None
    decode_ratio: Speed | None = None
    decode_ratio_low: Speed | None = None
    decode_ratio_high: Speed | None = None

    decode_samples: tuple[Speed, ...] = ()
    prefill_samples: tuple[Speed, ...] = ()
    notes: tuple[str, ...] = ()


def spread(name: str, samples: Sequence[float]) -> dict[str, float]:
    """The three fields of one figure.

    >>> spread("x", [3.0, 1.0, 2.0])
    {'x': 2.0, 'x_low': 1.0, 'x_high': 3.0}
    """
    return {name: median(samples), f"{name}_low": min(samples), f"{name}_high": max(samples)}


_KEPT = Sidecar(Benchmark, SUFFIX, SCHEMA_VERSION, "is no benchmark", _LARGEST_FILE, _AGAIN)
path_for, load, parse = _KEPT.path_for, _KEPT.load, _KEPT.parse
save, check_writable = _KEPT.save, _KEPT.check_writable
