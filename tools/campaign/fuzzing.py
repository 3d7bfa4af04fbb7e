"""Bytes that nobody would write, through every parser, by the million: what comes out that should not?

Each target of `fuzz_targets.py` runs in a process of its own.  A finding is anything but a DitherError, more than two
seconds of processor time, or more address space than 64 MiB above what the file has.  The last is held by
RLIMIT_AS, set anew before each execution: an allocation beyond it fails at once and shows as a MemoryError.  Findings
are told apart by their kind and place; the shortest input of each is kept, and the run goes on.

Mutations are guided by coverage: by libFuzzer's, through `atheris`, where that can be imported; else by a mutator of
this file with lines traced in a part of the executions.  JSON is mutated as a tree besides.

    python tools/campaign/fuzzing.py [--targets a,b] [--seconds 180 | --runs 1000000] [--jobs 2] [--seed 1] [--out FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

ABOVE = 64 * 2**20  # bytes of address space beyond the file's own
MOST_SECONDS = 2.0  # of processor time
ENDLESS = 60  # seconds after which a whole execution is given up, and its process with it
TRACED = 16  # the fallback traces the lines of one execution in so many
FIGURES = "figures.json"
_PAGE = os.sysconf("SC_PAGE_SIZE")
_INFINITE = resource.RLIM_INFINITY
ODD: list[Any] = [None, True, False, 0, -1, 1, 0.5, 1e308, 2**31, 2**63, 2**64, 10**30, "", "x", "\ud800", [], {}, [[]]]
EDGES = [b"\0" * 4, b"\xff" * 4, b"\xff" * 8, b"\0\0\0\x80", (2**62).to_bytes(8, "little"), b"\xff\xff\xff\x7f"]


class Watch:
    """One target being run: what it did, and what it should not have."""

    def __init__(self, run: Callable[[bytes], Any], kept: Path, longest: int) -> None:
        from dither.errors import DitherError

        self.run, self.kept, self.longest, self.refused_by = run, kept, longest, DitherError
        self.executions = self.accepted = self.refused = 0
        self.most_seconds = 0.0
        self.findings: dict[str, dict[str, Any]] = {}
        self.began = self._saved = time.monotonic()
        self._size = os.open("/proc/self/statm", os.O_RDONLY)

    def one(self, data: bytes) -> None:
        data = data[: self.longest]
        mapped = int(os.pread(self._size, 32, 0).split()[0]) * _PAGE
        resource.setrlimit(resource.RLIMIT_AS, (mapped + ABOVE + len(data), _INFINITE))
        found, began = None, time.process_time()
        try:
            self.run(data)
            self.accepted += 1
        except self.refused_by as error:
            self.refused += 1
            if not error.reason:
                found = "a refusal without a reason"
        except Exception as error:  # whatever it is, is the finding
            found = _place_of(error)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (_INFINITE, _INFINITE))
        taken = time.process_time() - began
        self.most_seconds = max(self.most_seconds, taken)
        if taken > MOST_SECONDS:
            found = f"{taken:.1f} s of processor time"
        self.executions += 1
        if found:
            self._keep(found if taken <= MOST_SECONDS else "takes too long", data, found)
        if found or not self.executions % 10_000 or time.monotonic() > self._saved + 1:
            self.save()

    def _keep(self, kind: str, data: bytes, said: str) -> None:
        before = self.findings.get(kind)
        if before is None or len(data) < before["bytes"]:
            name = hashlib.sha256(kind.encode()).hexdigest()[:12]
            (self.kept / name).write_bytes(data)
            times = before["times"] if before else 0
            self.findings[kind] = {"said": said, "input": name, "bytes": len(data), "times": times}
        self.findings[kind]["times"] += 1

    def save(self) -> None:
        self._saved = time.monotonic()
        figures = {
            "executions": self.executions,
            "accepted": self.accepted,
            "refused": self.refused,
            "seconds": round(time.monotonic() - self.began, 1),
            "most_seconds": round(self.most_seconds, 3),
            "findings": self.findings,
        }
        whole = self.kept / "figures.part"
        whole.write_text(json.dumps(figures))
        whole.replace(self.kept / FIGURES)


def _place_of(error: BaseException) -> str:
    """An error's kind and the last lines of ours on its way: two of the same are one finding."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "dither" in f.filename] or traceback.extract_tb(
        error.__traceback__
    )
    where = " < ".join(f"{Path(frame.filename).name}:{frame.name}" for frame in frames[-1:-3:-1])
    return f"{type(error).__name__} in {where}"


# Mutations of our own ----------------------------------------------------------------------------------------


def mutated_tree(data: bytes, draw: random.Random) -> bytes | None:
    """JSON with one or two nodes changed; None where it is no JSON."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return None
    for _ in range(draw.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        waiting = [tree]
        while waiting:
            node = waiting.pop()
            keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
            places += [(node, key) for key in keys]
            waiting += [node[key] for key in keys]
        if not places:
            break
        node, key = draw.choice(places)
        other, there = draw.choice(places)
        action = draw.randrange(5)
        if action == 0:
            del node[key]
        elif action == 1:
            inside = there in (other if isinstance(other, dict) else range(len(other)))
            node[key] = json.loads(json.dumps(other[there])) if inside else None  # a copy: trees have no circles
        elif action == 2 and isinstance(node[key], (int, float)):
            node[key] = draw.choice([-node[key], node[key] + 1, node[key] * 2**20, node[key] // 2, 1 / 3])
        elif action == 3 and isinstance(node, dict):
            renamed = draw.choice(list(node)) + draw.choice(["", "s", "_"])
            node[renamed] = node.pop(key)
        else:
            node[key] = deepcopy(draw.choice(ODD))  # lists of ours would grow into themselves
    try:
        return json.dumps(tree).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return None


def mutated_bytes(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """Overwritten, cut, repeated, filled with numbers at the edges, spliced with another input."""
    made = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(made) + 1)
        action = draw.randrange(6)
        if action == 0:
            made[at : at + 1] = bytes([draw.randrange(256)])
        elif action == 1:
            edge = draw.choice(EDGES)
            made[at : at + len(edge)] = edge
        elif action == 2:
            del made[at : at + draw.choice((1, 2, 4, 8, 32, len(made)))]
        elif action == 3:
            made[at:at] = made[at : at + draw.choice((1, 4, 8, 32))]
        elif action == 4:
            other = draw.choice(others)
            begin = draw.randrange(len(other) + 1)
            made[at:at] = other[begin : begin + draw.choice((4, 16, 64))]
        elif at < len(made):
            made[at] ^= 1 << draw.randrange(8)
    return bytes(made)


class Lines:
    """Which lines of ours an execution reached, by sys.settrace: slow, so only some executions are traced."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()
        self.news = False

    def _call(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        return self._line if "dither" in frame.f_code.co_filename else None

    def _line(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        place = (frame.f_code.co_filename, frame.f_lineno)
        if place not in self.seen:
            self.seen.add(place)
            self.news = True
        return self._line

    def new(self, run: Callable[[bytes], None], data: bytes) -> bool:
        self.news = False
        sys.settrace(self._call)
        try:
            run(data)
        finally:
            sys.settrace(None)
        return self.news


def own_engine(watch: Watch, seeds: list[bytes], is_json: bool, seed: int, until: float, runs: int) -> None:
    draw, lines, corpus = random.Random(seed), Lines(), list(seeds)
    while time.monotonic() < until and watch.executions < runs:
        base = draw.choice(corpus)
        made = mutated_tree(base, draw) if is_json and draw.random() < 0.7 else None
        data = mutated_bytes(base, corpus, draw) if made is None else made
        if watch.executions % TRACED:
            watch.one(data)
        elif lines.new(watch.one, data) and len(data) <= watch.longest:
            corpus.append(data)


def libfuzzer(watch: Watch, seeds: list[bytes], is_json: bool, seed: int, seconds: float, runs: int) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris

    corpus = watch.kept / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, data in enumerate(seeds):
        (corpus / f"seed{number}").write_bytes(data)
    options = [f"-seed={seed}", f"-max_len={watch.longest}", f"-timeout={ENDLESS}", "-rss_limit_mb=0", "-verbosity=0"]
    options += [f"-max_total_time={int(seconds)}"] if seconds < 1e8 else []
    options += [f"-runs={runs}"] if runs < 1e15 else []

    def mutate(data: bytes, longest: int, number: int) -> bytes:
        draw = random.Random(number)
        made = mutated_tree(bytes(data), draw) if draw.random() < 0.7 else None
        return atheris.Mutate(data, longest) if made is None else made[:longest]

    hooks = {"custom_mutator": mutate} if is_json else {}
    words = [sys.argv[0], *options, f"-artifact_prefix={watch.kept}/crash-", str(corpus)]
    atheris.Setup(words, watch.one, enable_python_coverage=True, **hooks)
    atheris.Fuzz()


def worker(name: str, kept: Path, seconds: float, runs: int, seed: int, engine: str) -> None:
    """One target in this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["dither", "zipfile", "tomllib"], enable_loader_override=False):
            from fuzz_targets import TARGETS
    else:
        from fuzz_targets import TARGETS
    target = TARGETS[name]
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="dither-fuzz-", dir=memory) as folder:
        seeds, run = target.prepare(Path(folder))
        for data in seeds:  # imports what is imported late, before memory is limited
            run(data)
        watch = Watch(run, kept, target.longest)
        watch.save()
        if engine == "atheris":
            libfuzzer(watch, seeds, target.is_json, seed, seconds, runs)
        own_engine(watch, seeds, target.is_json, seed, time.monotonic() + seconds, runs)
        watch.save()


@dataclass(frozen=True)
class Effort:
    """How hard each target is tried: until either is used up."""

    seconds: float
    runs: int
    seed: int
    engine: str  # "atheris" or "own"
    jobs: int = 2  # targets at once


def best_engine() -> str:
    return "atheris" if find_spec("atheris") else "own"


def one_target(name: str, kept: Path, effort: Effort) -> dict[str, Any]:
    """Runs the worker for one target, again after each crash of its process, until its share is done."""
    folder = kept / name
    folder.mkdir(parents=True, exist_ok=True)
    total: dict[str, Any] = {"target": name, "executions": 0, "accepted": 0, "refused": 0, "seconds": 0.0}
    total |= {"most_seconds": 0.0, "findings": {}, "processes_lost": []}
    for turn in range(20):
        runs, seconds = effort.runs - total["executions"], effort.seconds - total["seconds"]
        if runs <= 0 or seconds <= 1:
            break
        words = [sys.executable, __file__, "--worker", name, "--kept", str(folder), "--engine", effort.engine]
        words += ["--seconds", str(seconds), "--runs", str(runs), "--seed", str(effort.seed + turn)]
        ran = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        if not (folder / FIGURES).exists():
            raise SystemExit(f"{name}: {ran.stderr[-2000:]}")
        figures = json.loads((folder / FIGURES).read_text())
        (folder / FIGURES).unlink()
        for key in ("executions", "accepted", "refused", "seconds"):
            total[key] += figures[key]
        total["most_seconds"] = max(total["most_seconds"], figures["most_seconds"])
        for kind, finding in figures["findings"].items():
            total["findings"].setdefault(kind, finding)
        if ran.returncode == 0:
            break
        total["processes_lost"].append({"code": ran.returncode, "said": ran.stderr[-600:]})
    total["seconds"] = round(total["seconds"], 1)
    return total


def fuzz(names: Sequence[str], kept: Path, effort: Effort) -> Iterator[dict[str, Any]]:
    """Each target's figures, in order."""
    with ThreadPoolExecutor(effort.jobs) as pool:
        yield from pool.map(lambda name: one_target(name, kept.resolve(), effort), names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--targets", default="", help="names with commas between; default: all")
    parser.add_argument("--seconds", type=float, default=1e9, help="for each target")
    parser.add_argument("--runs", type=int, default=10**18, help="executions of each target")
    parser.add_argument("--jobs", type=int, default=2, help="targets at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("atheris", "own"), default=best_engine(), help="default: atheris if any")
    parser.add_argument("--kept", type=Path, help="a folder for inputs that found something")
    parser.add_argument("--out", type=Path, help="figures as JSON, written after each target")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        worker(chosen.worker, chosen.kept, chosen.seconds, chosen.runs, chosen.seed, chosen.engine)
        return
    from fuzz_targets import TARGETS

    names = chosen.targets.split(",") if chosen.targets else list(TARGETS)
    kept = chosen.kept or Path(tempfile.mkdtemp(prefix="dither-fuzz-findings-"))
    rows = []
    for row in fuzz(names, kept, Effort(chosen.seconds, chosen.runs, chosen.seed, chosen.engine, chosen.jobs)):
        rows.append(row)
        lost = len(row["processes_lost"])
        print(f"{row['target']:24} {row['executions']:>10} executions, {len(row['findings'])} findings, {lost} lost")
        for kind, finding in row["findings"].items():
            print(f"    {kind}: {finding['times']} times, {kept / row['target'] / finding['input']}", flush=True)
        if chosen.out:
            words = f"--runs {chosen.runs} --seconds {chosen.seconds:.0f} --seed {chosen.seed}"
            told = {"engine": chosen.engine, "command": f"python tools/campaign/fuzzing.py {words}", "rows": rows}
            chosen.out.write_text(json.dumps(told, indent=1) + "\n")
    if any(row["findings"] or row["processes_lost"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
