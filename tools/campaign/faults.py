"""Disks that fill, folders that may not be written, files that change while they are read, memory that runs out.

python tools/campaign/faults.py --seconds 600 --seed 1

Each fault meets a run at a random moment, or from the start at a random size.  A run may succeed with the very bytes
of an undisturbed one, or end with exit code 1 and an error that names what is wrong: no traceback, no signal, nothing
bad under a final name.  With the fault mended, the same command must end with the undisturbed run's bytes.

What it needs of the machine: mounting a tmpfs (root), a memory cgroup; what is missing is left out and said.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from children import Around, Ended, Moment, run, warm
from frame import Ask, Line, Row, main
from kills import EXISTS, Scenario, Whole, files_of, laid_out, of_final, scenarios, spoilt, undisturbed

NOBODY = 65534
OTHER_BYTES = "other bytes, and exit code 0"
CGROUPS = Path("/sys/fs/cgroup/memory")
DISK = 64 * 2**20
_NAMES = ("quantize to a GGUF", "quantize to a GGUF, gptq", "quantize to a folder", "calibrate on a text", "plan",
          "convert a GGUF to a folder", "quantize over another GGUF")  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What a fault is tried on: commands, and what they leave undisturbed."""

    known: Sequence[tuple[Scenario, Whole]]
    work: Path
    rng: random.Random
    ends: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # exit codes, by the trial

    def drawn(self) -> tuple[Scenario, Whole]:
        return self.rng.choice(self.known)


def _judged(scenario: Scenario, whole: Whole, folder: Path, ended: Ended, may: Sequence[int] = (0, 1)) -> str | None:
    """What is wrong with how a disturbed run ended, and with what it left."""
    if ended.has_traceback:
        return f"a traceback: {ended.said[-500:]}"
    if ended.code not in may:
        return f"exit code {ended.code}: {ended.said[-300:]}"
    if ended.code == 1 and "error:" not in ended.said:
        return f"no error said: {ended.said[-300:]}"
    if ended.code == 0 and of_final(files_of(folder), scenario.final) != of_final(whole.after, scenario.final):
        return OTHER_BYTES
    return spoilt(scenario, whole, folder)


def _resumed(scenario: Scenario, whole: Whole, folder: Path) -> str | None:
    last = run(scenario.words, folder)
    if last.code and EXISTS not in last.said and "holds evidence already" not in last.said:
        return f"the same command failed afterwards: {last.said[-400:]}"
    now = files_of(folder)
    if now != whole.after:
        names = [name for name in {*now, *whole.after} if now.get(name) != whole.after.get(name)]
        return f"not what an undisturbed run leaves: {', '.join(sorted(names)[:4])}"
    return None


def _mounted(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)


def full_disk(bench: Bench, number: int) -> str | None:
    """A disk with too little room from the start, or filled by somebody else at a random moment."""
    scenario, whole = bench.drawn()
    disk = bench.work / f"disk{number}"
    disk.mkdir()
    _mounted(disk, f"size={DISK}")
    try:
        folder = laid_out(scenario, disk / "run")
        ballast, from_the_start = disk / "ballast", bench.rng.random() < 0.5
        size = sum(map(len, whole.after.values()))

        def fill() -> None:
            status = os.statvfs(disk)
            free = status.f_bavail * status.f_frsize
            room = int(bench.rng.uniform(0, size)) if from_the_start else 0
            with ballast.open("wb") as file:
                try:
                    os.posix_fallocate(file.fileno(), 0, max(1, free - room))
                except OSError:  # what is free changes while it is taken
                    while True:
                        try:
                            os.write(file.fileno(), bytes(4096))
                        except OSError:
                            break

        if from_the_start:
            fill()
            ended = run(scenario.words, folder)
        else:
            moment = Moment(bench.rng.uniform(0, whole.seconds))
            ended = run(scenario.words, folder, moment, Around(meanwhile=fill))
        bench.ends["full_disk"].append(ended.code)
        broken = _judged(scenario, whole, folder, ended)
        ballast.unlink(missing_ok=True)
        broken = broken or _resumed(scenario, whole, folder)
        return broken and f"{scenario.what}: {broken}"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def unwritable(bench: Bench, number: int) -> str | None:
    """A disk mounted for reading alone, or a folder that belongs to somebody else."""
    scenario, whole = bench.drawn()
    disk = bench.work / f"ro{number}"
    disk.mkdir()
    _mounted(disk, f"size={DISK},mode=755")
    try:
        folder = laid_out(scenario, disk / "run")
        if bench.rng.random() < 0.5:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            ended = run(scenario.words, folder)
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        else:
            ended = run(scenario.words, folder, around=Around(first=lambda: os.setuid(NOBODY)))
        bench.ends["unwritable"].append(ended.code)
        if ended.code != 1:
            return f"{scenario.what}: exit code {ended.code} where nothing can be written: {ended.said[-300:]}"
        broken = _judged(scenario, whole, folder, ended) or _resumed(scenario, whole, folder)
        return broken and f"{scenario.what}: {broken}"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def _own_model(scenario: Scenario, work: Path) -> Scenario:
    """The same command on a copy of the model, in the folder itself."""
    return replace(
        scenario,
        words=["model" if word == str(work / "tiny") else word for word in scenario.words],
        given={**scenario.given, "model": work / "tiny"},
    )


CHANGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 3),
    "emptied": lambda path: os.truncate(path, 0),
    "written into": lambda path: _poked(path),
    "deleted": lambda path: path.unlink(),
    "replaced": lambda path: _swapped(path),
}


def _poked(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(4096))


def _swapped(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


def changing_source(bench: Bench, number: int) -> str | None:
    """The model's weights change while they are read; afterwards the old file is there again, time and all."""
    scenario, whole = bench.drawn()
    folder = laid_out(scenario, bench.work / f"source{number}")
    weights = folder / "model" / "model.safetensors"
    original = bench.work / "models" / "tiny" / "model.safetensors"
    how = bench.rng.choice(list(CHANGES))
    moment = Moment(bench.rng.uniform(0, whole.seconds))
    ended = run(scenario.words, folder, moment, Around(meanwhile=lambda: CHANGES[how](weights)))
    bench.ends["changing_source"].append(ended.code)
    broken = _judged(scenario, whole, folder, ended)
    if broken == OTHER_BYTES and _all_of_the_changed(scenario, folder, weights):
        broken = None
    if broken is None and ended.code == 1 and "model" not in ended.said:
        broken = f"the error does not name the file: {ended.said[-300:]}"
    shutil.copy2(original, weights)
    if not broken and ended.code == 1:
        broken = _resumed(scenario, whole, folder)
    shutil.rmtree(folder)
    return broken and f"{scenario.what}, {how} at {moment.seconds:.2f} s: {broken}"


def _all_of_the_changed(scenario: Scenario, folder: Path, weights: Path) -> bool:
    """Whether a run made what the changed weights alone make: it had not opened them before they changed."""
    if not weights.exists():
        return False
    again = laid_out(scenario, folder.with_name(f"{folder.name}-again"))
    shutil.copy2(weights, again / weights.relative_to(folder))
    ended = run(scenario.words, again)
    same = of_final(files_of(again), scenario.final) == of_final(files_of(folder), scenario.final)
    shutil.rmtree(again)
    return ended.code == 0 and same


def address_space(bench: Bench, number: int) -> str | None:
    """RLIMIT_AS: what the process has by then, and a random rest."""
    scenario, whole = bench.drawn()
    folder = laid_out(scenario, bench.work / f"space{number}")
    rest = int(bench.rng.uniform(0, 600)) * 2**20

    def limited() -> None:
        status = Path("/proc/self/statm").read_text().split()
        has = int(status[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has + rest, has + rest))

    ended = run(scenario.words, folder, around=Around(first=limited))
    bench.ends["address_space"].append(ended.code)
    # Compilers and libraries of linear algebra end the process themselves where they are refused memory.
    library = ended.code < 0 or any(word in ended.said for word in ("LLVM ERROR", "OpenBLAS", "terminate called"))
    broken = spoilt(scenario, whole, folder) if library else _judged(scenario, whole, folder, ended)
    broken = broken or _resumed(scenario, whole, folder)
    shutil.rmtree(folder)
    return broken and f"{scenario.what} with {rest >> 20} MiB more of addresses: {broken}"


def cgroup(bench: Bench, number: int) -> str | None:
    """A memory cgroup, as containers have one: the kernel kills what goes beyond."""
    scenario, whole = bench.drawn()
    folder, group = laid_out(scenario, bench.work / f"group{number}"), CGROUPS / f"campaign-{os.getpid()}-{number}"
    group.mkdir()
    try:
        size = int(bench.rng.uniform(8, 120)) * 2**20
        (group / "memory.limit_in_bytes").write_text(str(size))
        join = Around(first=lambda: _write(group / "cgroup.procs", str(os.getpid())))
        ended = run(scenario.words, folder, around=join)
        bench.ends["cgroup"].append(ended.code)
        broken = _judged(scenario, whole, folder, ended, (0, 1, -signal.SIGKILL))
        broken = broken or _resumed(scenario, whole, folder)
        shutil.rmtree(folder)
        return broken and f"{scenario.what} in {size >> 20} MiB: {broken}"
    finally:
        time.sleep(0.1)
        group.rmdir()


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def stalled_hub(bench: Bench, number: int) -> str | None:
    """A server that takes the connection and never answers: Ctrl-C must end the run at once, with 130."""
    folder = bench.work / f"hub{number}"
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(folder), "HF_HUB_DISABLE_TELEMETRY": "1"}
        words = bench.rng.choice((["inspect", "nobody/nothing"], ["quantize", "nobody/nothing", "--to", "Q4_K_M"]))
        command = [sys.executable, "-m", "dither", *words]
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        server.settimeout(300)  # a start takes seconds, and minutes on a machine that is busy
        connection, _ = server.accept()
        time.sleep(bench.rng.uniform(0.1, 1.5))
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        try:
            said, _ = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return f"{words[0]}: still there 20 s after Ctrl-C"
        finally:
            connection.close()
        took = time.monotonic() - started
    bench.ends["stalled_hub"].append(process.returncode)
    if process.returncode != 130 or "Traceback" in said:
        return f"{words[0]}: exit code {process.returncode}: {said[-400:]}"
    return f"{words[0]}: {took:.1f} s from Ctrl-C to the end" if took > 5 else None


def _mounts() -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None


def faults(ask: Ask) -> Sequence[Line]:
    warm()
    models = ask.work / "models"
    models.mkdir()
    ask.work.chmod(0o755)
    every = [scenario for scenario in scenarios(models) if scenario.what in _NAMES]
    for path in models.rglob("*"):  # whoever else a run is, it may read: what it must not do is write
        path.chmod(0o755 if path.is_dir() else 0o644)
    rng = random.Random(ask.seed)

    def bench(chosen: Sequence[Scenario]) -> Bench:
        known = [(one, undisturbed(one, ask.work / f"whole{i}")) for i, one in enumerate(chosen)]
        return Bench(known, ask.work, rng)

    plain = bench(every)
    own = bench([_own_model(one, models) for one in every if str(models / "tiny") in one.words])
    trials: list[tuple[str, Callable[[Bench, int], str | None], Bench, bool]] = [
        ("a full disk", full_disk, plain, _mounts()),
        ("a disk or folder that may not be written", unwritable, plain, _mounts()),
        ("weights truncated, changed, deleted or replaced while they are read", changing_source, own, True),
        ("RLIMIT_AS", address_space, plain, True),
        ("a memory cgroup", cgroup, plain, os.access(CGROUPS, os.W_OK) and (CGROUPS / "cgroup.procs").exists()),
        ("a hub that takes the connection and stalls, and Ctrl-C", stalled_hub, plain, True),
    ]
    lines = [Line(what, figures={} if able else {"not tried here": "it needs root"}) for what, _, _, able in trials]
    number = 0
    while not ask.over(number) or number < len(trials):  # each once, however slow the machine
        line, (_, trial, on, able) = lines[number % len(trials)], trials[number % len(trials)]
        # A server that stalls costs a fresh process: one in four rounds.
        if able and (trial is not stalled_hub or number // len(trials) % 4 == 0):
            line.count(trial(on, number))
            line.figures["ended in an error"] = sum(code != 0 for code in on.ends[trial.__name__])
        number += 1
    return lines


ROW = Row("faults", "Disk, memory, and files that change underneath", faults, share=10)

if __name__ == "__main__":
    main(ROW)
