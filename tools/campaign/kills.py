"""Kill −9 at random moments: nothing bad may stand under a final name, and the same command must finish the work.

python tools/campaign/kills.py --runs 200 --seed 1

Every scenario is run once undisturbed.  Then it is killed, half of the times by the clock (uniform over the measured
time) and half by the step (uniform over all changes of names on the disk, so that renames, journals and what is
embedded at the end get their share); a quarter is killed again while it resumes.  After each kill what stands under
the final name must be what the undisturbed run wrote, or what stood there before; after the same command has run to
its end everything must be byte for byte what the undisturbed run left, and nothing else may lie beside it.
SIGINT and SIGTERM must end with 130 and 143 and a word on how to go on.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from children import Ended, Moment, run, warm
from frame import ROOT, Ask, Line, Row, main

from dither.cli.screen import CONTINUES

sys.path[:0] = [str(ROOT / "tests")]

FRESH = 12  # one in so many is a process of its own
AGAIN = 4  # one in so many is killed while it resumes, too
MANIFEST = "evidence.json"  # a folder of evidence is one from when it has this
OURS = "/dither/"  # in a line of a traceback
EXISTS = "exists already"  # what a command says that was killed when all was done
# What differs between two undisturbed runs: how long measuring took.
_SECONDS = re.compile(rb'"seconds": ?[0-9.e+-]+ *')
Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Scenario:
    """`words` of the command; `final` is the file or folder it makes; `given` files and folders (name → which)
    lie in its folder before."""

    what: str
    words: Sequence[str]
    final: str
    given: Mapping[str, Path] = field(default_factory=dict)
    resumable: bool = True  # it says so when it is interrupted


@dataclass(frozen=True)
class Whole:
    """What a scenario leaves undisturbed, what was there before, and how long it takes."""

    after: Files
    before: Files
    seconds: float
    steps: int


def scenarios(work: Path) -> list[Scenario]:
    """Tiny models and what is made of them, in `work`."""
    from conftest import SENTENCES, write_checkpoint

    model, text = str(write_checkpoint(work / "tiny")), str(work / "text.txt")
    rng = random.Random(0)
    Path(text).write_text("\n".join(" ".join(rng.choices(SENTENCES, k=6)) for _ in range(400)))
    learned = ["--solver", "learned", "--threads", "1"]  # torch's sums hang on the number of threads
    small = ["--tokens", "1024", "-c", "64"]
    on_text = ["calibrate", model, "--data", text, *small]
    _made(work, [*on_text, "--gradients", "-o", "evidence"])
    _made(work, ["quantize", model, "--to", "Q8_0", "-o", "old.gguf"])
    _made(work, ["quantize", model, "--to", "fp8", "-o", "old"])
    _made(work, ["convert", model, "whole.gguf", "--dtype", "f32"])
    to, on = ["quantize", model, "--to"], ["--evidence", str(work / "evidence")]
    old = {"old.gguf": work / "old.gguf"}
    return [
        Scenario("quantize to a GGUF", [*to, "Q4_K_M", "-o", "a.gguf"], "a.gguf"),
        Scenario("quantize to a GGUF, gptq", [*to, "Q3_K_M", *on, "-o", "a.gguf"], "a.gguf"),
        Scenario("quantize to a GGUF, learned", [*to, "Q2_K", *on, *learned, "-o", "a.gguf"], "a.gguf"),
        Scenario("quantize to a GGUF, measured", [*to, "Q4_K_M", *on, "--measure", "-o", "a.gguf"], "a.gguf"),
        Scenario("quantize over another GGUF", [*to, "Q5_K_M", "-o", "old.gguf", "--force"], "old.gguf", old),
        Scenario("quantize to a folder", [*to, "fp8", "-o", "a"], "a"),
        Scenario("quantize to a folder, gptq, measured", [*to, "gptq", *on, "--measure", "-o", "a"], "a"),
        Scenario("quantize over another folder", [*to, "w8a8", "-o", "old", "--force"], "old", {"old": work / "old"}),
        Scenario("calibrate on a text", [*on_text, "-o", "a"], "a"),
        Scenario("calibrate on a text, gradients", [*on_text, "--gradients", "-o", "a"], "a"),
        Scenario("calibrate on what the model writes", ["calibrate", model, *small, "-o", "a"], "a"),
        Scenario("plan", ["plan", model, "--bpw", "6", "--types", "Q4_K,Q8_0", "--solver", "nearest", "--evidence",
                          "evidence", "-o", "plan.toml"], "plan.toml", {"evidence": work / "evidence"}),
        Scenario("convert parts into one GGUF", ["convert", _parts(work / "whole.gguf"), "a.gguf"], "a.gguf"),
        Scenario("convert a GGUF to a folder", ["convert", str(work / "old.gguf"), "a"], "a"),
        Scenario("measure", ["measure", "old.gguf", "--against", model, "--data", text, *small],
                 "old.gguf.measure.json", old, resumable=False),
    ]  # fmt: skip


def _made(work: Path, words: Sequence[str]) -> None:
    ended = run(words, work)
    if ended.code:
        raise SystemExit(f"dither {' '.join(words)}: {ended.said}")


def _parts(whole: Path) -> str:
    """The first of the parts that a GGUF is cut into."""
    from dither.containers.split import split

    return str(split(whole, whole.parent / "parts", whole.stat().st_size // 3)[0])


def files_of(folder: Path) -> Files:
    """What lies in a folder, by names within it; how long measuring took is left out."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): _SECONDS.sub(b"", path.read_bytes()) for path in found}


def of_final(files: Files, final: str) -> Files:
    return {name: data for name, data in files.items() if name == final or name.startswith(f"{final}/")}


def laid_out(scenario: Scenario, folder: Path) -> Path:
    folder.mkdir()
    for name, path in scenario.given.items():
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, folder / name)
    return folder


def undisturbed(scenario: Scenario, folder: Path) -> Whole:
    before = files_of(laid_out(scenario, folder))
    ended = run(scenario.words, folder)
    if ended.code:
        raise SystemExit(f"{scenario.what}: {ended.said}")
    after = files_of(folder)
    shutil.rmtree(folder)
    return Whole(after, before, ended.seconds, ended.steps)


def spoilt(scenario: Scenario, whole: Whole, folder: Path) -> str | None:
    """What is wrong with what a killed run left under the final name."""
    now, good = of_final(files_of(folder), scenario.final), of_final(whole.after, scenario.final)
    evidence = f"{scenario.final}/{MANIFEST}"
    if evidence in good and evidence not in now:
        return None  # not finished, and it says so
    if evidence in good:  # finished, perhaps with leftovers
        now = {name: data for name, data in now.items() if name in good}
    if now in (good, of_final(whole.before, scenario.final)):
        return None
    aside = of_final(files_of(folder), f"{scenario.final}.replaced")
    if not now and len(aside) == len(of_final(whole.before, scenario.final)):
        return None  # between two renames: the old one stands aside, and the new one is whole in its part
    return f"{scenario.final} is neither the old nor the new one ({_difference(now, good)})"


def _difference(now: Files, wanted: Files) -> str:
    names = sorted(set(now) ^ set(wanted))
    if names:
        return ", ".join(f"{name} {'is left over' if name in now else 'is missing'}" for name in names[:4])
    return "other bytes: " + ", ".join(name for name in wanted if now[name] != wanted[name])


def tried(scenario: Scenario, whole: Whole, folder: Path, moments: Sequence[Moment]) -> tuple[str | None, bool]:
    """One kill, or several in a row, and the run that finishes: what broke, and whether a kill met a living run."""
    laid_out(scenario, folder)
    met = False
    for moment in moments:
        ended = run(scenario.words, folder, moment)
        # An interruption before the work begins or after it has ended leaves nothing to go on with.
        at_work = files_of(folder) not in (whole.before, whole.after)
        broken = _ended_badly(scenario, moment, ended, at_work) or spoilt(scenario, whole, folder)
        if broken:
            return broken, True
        met |= ended.code not in (0, 1)
    last = run(scenario.words, folder)
    done = EXISTS in last.said or "holds evidence already" in last.said
    if last.code and not done:
        return f"the same command failed: {last.said[-600:]}", met
    now = files_of(folder)
    if now != whole.after:
        return f"not what an undisturbed run leaves: {_difference(now, whole.after)}", met
    return None, met


def _ended_badly(scenario: Scenario, moment: Moment, ended: Ended, at_work: bool) -> str | None:
    """Whether the end that a signal put to a run is one that it should have."""
    # In its first hundredths of a second a process is Python alone, which answers Ctrl-C with a traceback of its own.
    if ended.has_traceback and not (moment.fresh and OURS not in ended.said):
        return f"a traceback: {ended.said[-600:]}"
    if moment.signal == signal.SIGKILL:
        return None if ended.code in (0, 1, -signal.SIGKILL) else f"exit code {ended.code}: {ended.said[-300:]}"
    wanted = 128 + moment.signal
    outside = -moment.signal  # while modules loaded, or after the command had ended
    if ended.code not in (0, 1, wanted, outside):
        return f"exit code {ended.code} on {moment}: {ended.said[-300:]}"
    if ended.code == wanted and scenario.resumable and at_work and CONTINUES not in " ".join(ended.said.split()):
        return f"no word on how to go on: {ended.said[-300:]}"
    return None


def moments(rng: random.Random, whole: Whole, number: int, interrupt: bool) -> Iterator[Moment]:
    """One, or one and another for the run that resumes."""
    again = number % AGAIN == AGAIN - 1
    for _ in range(1 + again):
        which = rng.choice((signal.SIGINT, signal.SIGTERM)) if interrupt else signal.SIGKILL
        if number % FRESH == FRESH - 1 or (interrupt and number % 10 == 9):  # a fresh process takes seconds to start
            yield Moment(rng.uniform(0, whole.seconds + 4), signal=which, fresh=True)
        elif number % 2 and not interrupt:
            yield Moment(step=rng.randint(1, whole.steps))
        else:
            yield Moment(rng.uniform(0, whole.seconds), signal=which)


def kills(ask: Ask) -> Sequence[Line]:
    rng = random.Random(ask.seed)
    warm()
    models = ask.work / "models"
    models.mkdir()
    known = scenarios(models)
    wholes = [undisturbed(scenario, ask.work / f"whole{i}") for i, scenario in enumerate(known)]
    lines = [Line(scenario.what, figures={"killed at work": 0}) for scenario in known]
    signals = Line("SIGINT or SIGTERM, any of these", figures={"stopped at work": 0})
    number = 0
    while not ask.over(number):
        at = number % len(known)
        interrupt = number // len(known) % 5 == 4
        line = signals if interrupt else lines[at]
        chosen = list(moments(rng, wholes[at], number // len(known), interrupt))
        folder = ask.work / f"run{number}"
        broken, met = tried(known[at], wholes[at], folder, chosen)
        line.count(broken and f"{known[at].what}, {', then '.join(map(str, chosen))}: {broken}")
        line.figures[next(iter(line.figures))] += met
        number += 1
        if not broken:
            shutil.rmtree(folder)
    return [*lines, signals]


ROW = Row("kills", "Killed at random moments", kills, share=20)

if __name__ == "__main__":
    main(ROW)
