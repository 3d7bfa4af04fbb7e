"""How fast a file ran: the benchmark beside it (`dither bench`), as the results document has it.

A benchmark is of one machine, which it names, and of one state of the file: another size makes it stale, and
another time only adds a note, since copying a file changes it too.
"""

from __future__ import annotations

from pathlib import Path

from dither.reporting.document import SpeedRecord, TaggedValue, Value
from dither.running import benchmark
from dither.running.benchmark import Benchmark
from dither.system.text import shown


def benchmark_of(path: Path, size: int) -> tuple[Benchmark | None, list[str]]:
    """What was timed of a file of `size` bytes, all its parts together, and notes on it.  Raises DitherError where what
    lies beside the file is no benchmark."""
    place = benchmark.path_for(path)
    if not place.is_file():
        return None, []
    found = benchmark.load(place)
    again = f"Time it again: dither bench {path.name}."
    if found.file_bytes != size:
        return None, [f"Stale: {place.name} is of an earlier {path.name}. {again}"]
    if found.file_modified_ns != path.stat().st_mtime_ns:
        return found, [f"{path.name} was written or copied after it was timed. {again}"]
    return found, []


def metrics_of(found: Benchmark) -> dict[str, TaggedValue]:
    """What the frontier may be drawn over."""
    spreads = {
        "prefill_tokens_per_second": found.prefill_tokens_per_second,
        "decode_tokens_per_second": found.decode_tokens_per_second,
        "time_to_first_token": found.time_to_first_token_seconds,
        "joules_per_token": found.joules_per_token,
    }
    return {
        **{key: TaggedValue.model_validate(spread.ends) for key, spread in spreads.items() if spread is not None},
        "load_seconds": TaggedValue(value=found.load_seconds),
        "peak_memory_bytes": TaggedValue(value=float(found.peak_memory_bytes)),
    }


def speed_of(run_id: str, found: Benchmark) -> SpeedRecord:
    """The entry of view 7."""
    joules = found.joules_per_token
    return SpeedRecord(
        run=run_id,
        command=shown(found.command, 1000),
        threads=found.threads,
        prefill=Value.model_validate(found.prefill_tokens_per_second.ends),
        decode=Value.model_validate(found.decode_tokens_per_second.ends),
        peak_memory_bytes=found.peak_memory_bytes,
        joules_per_token=None if joules is None else Value.model_validate(joules.ends),
        joules_note=shown(found.energy_note, 400),
        machine=shown(found.cpu, 400),
    )
