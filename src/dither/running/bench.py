"""Benchmarking: how fast files run here, in what memory, for how many joules.

    check everything → a process for each file → a round to warm up → rounds, every file in each → medians

The files take turns within each round, so that a machine that gets warm or busy does so for all of them; ratios
are taken round by round.  Each model has a process of its own (`running.worker`), so that the process's memory is
the model's.  If the models do not fit into memory together, each is loaded again for every turn.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dither._version import __version__
from dither.capacity.machine import cpu_name, system_memory
from dither.containers.mix import PLANNED, is_planned
from dither.containers.presets import preset_of
from dither.errors import UnsupportedError, UsageError
from dither.models.source import open_model
from dither.progress import Progress, Silent
from dither.running import benchmark, llama_bench
from dither.running.benchmark import Benchmark, Spread, spread
from dither.running.energy import EnergyMeter
from dither.running.llama_bench import Opinion
from dither.running.worker import Trial, Worker
from dither.system.cores import usable_cores
from dither.types import Model

PROMPT, GENERATE, REPEATS = 512, 64, 5
_SHARE = 0.7  # of the free memory that all models together may take


@dataclass
class _Runner:
    """A file and what was timed of it so far."""

    model: Model
    trials: list[Trial] = field(default_factory=list)
    opinions: list[Opinion] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    worker: Worker | None = None  # of the last turn
    peak: int = 0
    before: int = 0
    doubt: str = ""  # why there is nothing from llama-bench

    @property
    def path(self) -> Path:
        return Path(self.model.files[0])

    @property
    def bytes(self) -> int:
        return sum(Path(file).stat().st_size for file in self.model.files)


def bench(
    files: str | Path | Sequence[str | Path],
    *,
    against: str | Path | None = None,
    threads: int | None = None,
    context: int = 0,
    prompt: int = PROMPT,
    generate: int = GENERATE,
    repeats: int = REPEATS,
    save: bool = True,
    progress: Progress | None = None,
) -> list[Benchmark]:
    """Speeds, times, memory and energy of GGUFs on this machine, in the order given; `against` last.

    Every round reads a prompt of `prompt` tokens and writes `generate`; the first round is not counted.
    `against` is another GGUF, to whose speed the others get a ratio.  `context` 0 is up to 4096.  With `save`,
    each result is written as `<file>.bench.json`.

    Raises UsageError if the request makes no sense, UnsupportedError for a file that is not a GGUF, EngineError
    if llama.cpp refuses a file, OutputError if a result cannot be written.
    """
    report = progress or Silent()
    named = [files] if isinstance(files, str | Path) else list(files)
    if not named:
        raise UsageError("dither bench", "was given no file", "Name at least one GGUF.")
    if min(prompt, repeats) < 1 or generate < 2:
        reason = f"of {prompt} prompt and {generate} generated tokens, {repeats} times, measures nothing"
        raise UsageError("a benchmark", reason, "Take at least 1 prompt token, 2 generated ones and 1 repeat.")
    runners = _open(named, against)
    threads = threads or usable_cores()
    places = [benchmark.path_for(runner.model.origin) for runner in runners] if save else []
    for place in places:
        benchmark.check_writable(place)
    _run(runners, threads, context, prompt, generate, repeats, report)
    command = shlex.join(["dither", "bench", *(Path(file).name for file in named)])
    command += f" --against {shlex.quote(Path(against).name)}" if against else ""
    command += f" --threads {threads} -c {context} -p {prompt} -n {generate} -r {repeats}"
    shared = {
        "command": command,
        "threads": threads,
        "prompt_tokens": _prompt(runners, prompt, generate),
        "generated_tokens": generate,
        "repeats": repeats,
        "energy_note": EnergyMeter().note,
    }
    other = runners[-1] if against is not None else None
    results = [_result(runner, other, shared) for runner in runners]
    for result, place in zip(results, places, strict=False):
        benchmark.save(result, place)
    return results


def _open(files: Sequence[str | Path], against: str | Path | None) -> list[_Runner]:
    runners: dict[str, _Runner] = {}
    for file in [*files, *([against] if against is not None else [])]:
        model = open_model(file)
        if model.kind != "gguf":
            way_out = "Make a GGUF of it, `dither convert FOLDER model.gguf`; vLLM has `vllm bench` for folders."
            raise UnsupportedError(str(file), "is a folder; bench runs GGUFs through llama.cpp", way_out)
        if model.files[0] in runners:
            raise UsageError(str(file), "is named twice", "Name each file once.")
        runners[model.files[0]] = _Runner(model)
    return list(runners.values())


def _run(
    runners: Sequence[_Runner], threads: int, context: int, prompt: int, generate: int, repeats: int, report: Progress
) -> None:
    (_, free), needed = system_memory(), sum(runner.bytes for runner in runners)
    together = len(runners) == 1 or free is None or needed < _SHARE * free
    if not together:
        report.note("the models do not fit into memory together: each is loaded again for every turn")
    asked = shutil.which(llama_bench.PROGRAM)
    report.start(len(runners) * (1 + repeats), 0)
    with ExitStack() as stack:
        for turn in range(1 + repeats):
            for runner in runners:
                worker = runner.worker if together else None
                if worker is None:
                    worker = stack.enter_context(closing(Worker(runner.path, context=context, threads=threads)))
                    runner.worker = worker
                    runner.loads.append(worker.load_seconds)
                size = _prompt(runners, prompt, generate)
                trial = worker.trial(size, generate, seed=turn)
                runner.peak, runner.before = worker.memory()
                if turn:  # round 0 warms up
                    runner.trials.append(trial)
                    _second_opinion(runner, asked, size, generate, threads, worker.gpu)
                if not together:
                    worker.close()
                report.advance(1, f"{runner.path.name}, {f'round {turn}' if turn else 'warming up'}")


def _prompt(runners: Sequence[_Runner], prompt: int, generate: int) -> int:
    """One prompt length for all, which leaves room for the answer in the smallest context."""
    context = min(runner.worker.context for runner in runners if runner.worker)
    if context <= generate:
        reason = f"of {context} tokens has no room for a prompt and {generate} more"
        raise UsageError("a context", reason, "Generate fewer with -n, or allow more with -c.")
    return min(prompt, context - generate)


def _second_opinion(runner: _Runner, asked: str | None, prompt: int, generate: int, threads: int, gpu: bool) -> None:
    if asked is None:
        runner.doubt = f"no {llama_bench.PROGRAM} on the PATH"
    elif not runner.doubt:
        work = {"prompt": prompt, "generate": generate, "threads": threads}
        found, runner.doubt = llama_bench.ask(asked, runner.path, **work, gpu=gpu)
        runner.opinions += [found] if found else []


def _result(runner: _Runner, other: _Runner | None, shared: dict[str, Any]) -> Benchmark:
    model, trials, opinions = runner.model, runner.trials, runner.opinions
    assert runner.worker is not None
    rival = None if other is None or other is runner else other
    pairs = [] if rival is None else list(zip(trials, rival.trials, strict=True))
    return Benchmark(
        tool=f"dither {__version__}",
        engine=runner.worker.engine,
        file=runner.path.name,
        file_bytes=runner.bytes,
        file_modified_ns=runner.path.stat().st_mtime_ns,
        type=PLANNED if is_planned(model) else preset_of(model.value("general.file_type")) or "",
        cpu=cpu_name(),
        cores=usable_cores(),
        context=runner.worker.context,
        prefill_tokens_per_second=spread([trial.prefill for trial in trials]),
        decode_tokens_per_second=spread([trial.decode for trial in trials]),
        engine_decode_tokens_per_second=spread([trial.engine_decode for trial in trials]),
        time_to_first_token_seconds=spread([trial.first_token for trial in trials]),
        load_seconds=min(runner.loads),
        peak_memory_bytes=runner.peak,
        memory_before_load_bytes=runner.before,
        joules_per_token=_spread(trial.joules_per_token for trial in trials),
        llama_bench_prefill_tokens_per_second=_spread(opinion.prefill for opinion in opinions),
        llama_bench_decode_tokens_per_second=_spread(opinion.decode for opinion in opinions),
        llama_bench_note=runner.doubt,
        against="" if rival is None else rival.path.name,
        prefill_ratio=_spread(ours.prefill / theirs.prefill for ours, theirs in pairs if theirs.prefill),
        decode_ratio=_spread(ours.decode / theirs.decode for ours, theirs in pairs if theirs.decode),
        decode_samples=tuple(trial.decode for trial in trials),
        prefill_samples=tuple(trial.prefill for trial in trials),
        notes=model.notes,
        **shared,
    )


def _spread(samples: Iterable[float | None]) -> Spread | None:
    known = [sample for sample in samples if sample is not None]
    return spread(known) if known else None
