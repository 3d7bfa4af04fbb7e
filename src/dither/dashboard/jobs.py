"""Jobs: commands that run as processes of their own, and outlive the page and the server that started them.

    STATE/<id>/job.json        what was asked, which process does it, how it ended
               result.json     what the command printed: its result, or its error
               log.txt         what it told people meanwhile
               progress.json   where it stands (`dither.cli.reported`)

Everything is on disk, so that a server started later finds the jobs again and knows a process by its id and
the moment it began.  A job is judged by what its command left behind: an `error` says why it failed, a whole
document that it is done, and the end of the log where it left neither (killed, out of memory).

One job runs at a time, because each uses all cores; others wait for the server that took them.  Ending a job
is asking first (SIGINT: it puts its work in order, and the same command continues it), then telling.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dither.dashboard import processes
from dither.dashboard.forms import Command, Forms
from dither.errors import DitherError, OutputError, SourceError, UsageError
from dither.system import isolated, native
from dither.system.files import read_bytes, replacing
from dither.system.json_text import parse_json

MOST_KEPT = 50  # jobs that have ended; older ones are forgotten, their files are not
MOST_WAITING = 20
LINES, LONGEST_LINE = 200, 500
_LARGEST = 64 * 2**20  # bytes of a result that is read
_ASKED, _TOLD = 8.0, 20.0  # seconds after SIGINT and SIGTERM
_OPEN = ("process", "cancelled", "ended", "code")  # what a job's record has no value for at first
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9]{6}[0-9a-f]{6}")  # the time, to sort by, and what none can guess
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x20-\x7e\t\x80-\U0010ffff]|[\x80-\x9f]")


def state_folder() -> Path:
    """Where jobs are kept: $XDG_STATE_HOME/dither/jobs."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".local/state") / "dither" / "jobs"


class Jobs:
    """All jobs of a folder.  `tick` moves them on, and is called about twice a second."""

    def __init__(self, forms: Forms, folder: Path | None = None, work_in: Path | None = None) -> None:
        self.forms = forms
        self.folder = folder or state_folder()
        self.work_in = (work_in or Path.cwd()).absolute()
        self.told: Callable[[dict[str, Any]], None] = lambda _job: None  # hears of every change
        self._lock = threading.RLock()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._looks: dict[str, tuple[str, float]] = {}  # what a job last looked like, since when
        self._told_of: dict[str, float] = {}  # the look that was told
        self._ended: dict[str, dict[str, Any]] = {}  # of these nothing changes any more
        self._me = {"pid": os.getpid(), "since": processes.started(os.getpid()) or ""}
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise OutputError(
                str(self.folder), f"cannot keep jobs ({error.strerror})", "Set XDG_STATE_HOME to a folder."
            ) from None

    def start(self, kind: str, fields: Mapping[str, object]) -> dict[str, Any]:
        """Takes a job.  Raises UsageError where the form is not filled in, or too many wait."""
        command = self.forms.command(kind, fields)
        if command.problems:
            first = command.problems[0]
            raise UsageError(first["field"], first["reason"], "Correct the form.")
        with self._lock:
            if sum(job["state"] == "waiting" for job in self.all()) >= MOST_WAITING:
                raise UsageError("the queue", f"holds {MOST_WAITING} jobs", "Wait for one, or cancel one.")
            job_id = f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S-%f}{secrets.token_hex(3)}"
            record = {
                "id": job_id,
                "kind": kind,
                "words": list(command.words),
                "folder": str(self.work_in),
                "created": time.time(),
                "server": self._me,
                **dict.fromkeys(_OPEN),
            }
            (self.folder / job_id).mkdir(mode=0o700)
            self._write(record)
            self.tick()
            return self.get(job_id)

    def all(self) -> list[dict[str, Any]]:
        """Every job, the youngest first."""
        with self._lock:
            return list(filter(None, map(self._seen, reversed(self._names()))))

    def get(self, job_id: str) -> dict[str, Any]:
        """Raises SourceError where there is no such job."""
        with self._lock:
            job = self._seen(job_id) if _ID.fullmatch(job_id) else None
        if job is None:
            raise SourceError(f"job {job_id[:40]}", "is not known", "It may have been forgotten: reload.")
        return job

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Asks a job to end.  What has ended stays as it is.  Raises SourceError as `get` does."""
        with self._lock:
            self.get(job_id)
            record = self._record(job_id)
            if record is not None and record["ended"] is None and record["cancelled"] is None:
                record["cancelled"] = time.time()
                if process := record["process"]:
                    processes.end(process["pid"], process["since"], signal.SIGINT)
                else:
                    record["ended"] = record["cancelled"]
                self._write(record)
            self.tick()
            return self.get(job_id)

    def running(self) -> int:
        """Jobs that go on when this server ends; those that wait for it do not begin."""
        return sum(job["state"] == "running" for job in self.all())

    def tick(self) -> None:
        """Notices what has ended, presses those that should, starts what waits, tells what changed."""
        with self._lock:
            busy = False
            waiting = []
            for name in self._names():
                record = None if name in self._ended else self._record(name)
                if record is None or record["ended"] is not None:
                    continue
                if record["process"] is None:
                    waiting.append(record)
                elif not self._has_ended(record):
                    self._press(record)
                    busy = True
            for record in waiting:
                if not processes.alive(record["server"]["pid"], record["server"]["since"]):
                    record["cancelled"] = record["ended"] = time.time()  # nobody waits for it any more
                    self._write(record)
                elif record["server"] == self._me and not busy:
                    busy = True
                    self._run(record)
            self._forget()
            for job in self.all():
                if self._told_of.get(job["id"]) != job["changed"]:
                    self._told_of[job["id"]] = job["changed"]
                    self.told(job)

    def _run(self, record: dict[str, Any]) -> None:
        place = self.folder / record["id"]
        environment = {**os.environ, "DITHER_PROGRESS": str(place / "progress.json"), "NO_COLOR": "1", "COLUMNS": "120"}
        try:
            with (place / "result.json").open("wb") as result, (place / "log.txt").open("wb") as log:
                worker = subprocess.Popen(
                    [*isolated.command("dither.cli"), *record["words"], "--json"],
                    cwd=record["folder"],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=result,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            record.update(ended=time.time(), code=1, failed=f"could not be started ({error.strerror})")
        else:
            self._children[record["id"]] = worker
            record["process"] = {"pid": worker.pid, "since": processes.started(worker.pid), "started": time.time()}
        self._write(record)

    def _has_ended(self, record: dict[str, Any]) -> bool:
        worker, process = self._children.get(record["id"]), record["process"]
        if worker is not None:
            record["code"] = worker.poll()
            if record["code"] is None:
                return False
            del self._children[record["id"]]
        elif process["since"] is not None and processes.alive(process["pid"], process["since"]):
            return False
        record["ended"] = time.time()
        self._write(record)
        return True

    def _press(self, record: Mapping[str, Any]) -> None:
        """What was asked to end and has not is told, and at last killed."""
        if record["cancelled"] is None:
            return
        waited, process = time.time() - record["cancelled"], record["process"]
        if waited > _ASKED + _TOLD:
            processes.end(process["pid"], process["since"], native.KILL)
        elif waited > _ASKED:
            processes.end(process["pid"], process["since"], signal.SIGTERM)

    def _forget(self) -> None:
        ended = [name for name in self._names() if name in self._ended]
        for name in ended[:-MOST_KEPT]:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            for kept in (self._ended, self._looks, self._told_of):
                kept.pop(name, None)

    def _names(self) -> list[str]:
        """The oldest first."""
        with contextlib.suppress(OSError):
            return sorted(place.name for place in self.folder.iterdir() if _ID.fullmatch(place.name))
        return []

    def _record(self, job_id: str) -> dict[str, Any] | None:
        found = _object(_read_json(self.folder / job_id / "job.json", 2**20))
        wanted = {"id", "kind", "words", "folder", "created", "server", *_OPEN}
        return found if wanted <= found.keys() and found["id"] == job_id else None

    def _write(self, record: Mapping[str, Any]) -> None:
        with replacing(self.folder / str(record["id"]) / "job.json", sync=False) as file:
            file.write(json.dumps(record, indent=1).encode())

    def _seen(self, job_id: str) -> dict[str, Any] | None:
        """A job as the page gets it."""
        if job_id in self._ended:
            return self._ended[job_id]
        record = self._record(job_id)
        if record is None:
            return None
        place = self.folder / job_id
        state, error = _state(record, place)
        progress, eta = _progress(place / "progress.json", state)
        process = record["process"]
        job = {
            "id": job_id,
            "kind": record["kind"],
            "command": Command(tuple(record["words"]), ()).line,
            "folder": record["folder"],
            "state": state,
            "cancelling": state == "running" and record["cancelled"] is not None,
            "progress": progress,
            "eta_seconds": eta,
            "created": record["created"],
            "started": process["started"] if process else None,
            "ended": record["ended"],
            "error": error,
            "lines": _lines(place / "log.txt"),
            "made": _made(place) if state == "done" else None,
        }
        # Since when it looks so: of two answers on their way, it tells which is the younger.
        look = json.dumps(job, sort_keys=True)
        old, since = self._looks.get(job_id, ("", 0.0))
        if look != old:
            since = max(time.time(), math.nextafter(since, math.inf))  # clocks are set back, and have steps
            self._looks[job_id] = look, since
        job["changed"] = since
        if record["ended"] is not None:
            self._ended[job_id] = job
        return job


def _state(record: Mapping[str, Any], place: Path) -> tuple[str, dict[str, str] | None]:
    if record["ended"] is None:
        return ("waiting" if record["process"] is None else "running"), None
    if record["process"] is None:
        if record.get("failed"):
            return "failed", DitherError("the job", record["failed"]).to_json()
        return "cancelled", None
    result = _read_json(place / "result.json", _LARGEST)
    error = _object(result).get("error")
    if result is not None and not isinstance(error, dict) and record["code"] in (0, None):
        return "done", None
    if record["cancelled"] is not None:
        return "cancelled", None
    if isinstance(error, dict):
        return "failed", {part: str(error.get(part, ""))[:2000] for part in ("thing", "reason", "way_out")}
    lines = _lines(place / "log.txt")
    reason = "ended without a result"
    if (code := record["code"] or 0) < 0:
        known = -code in map(int, signal.Signals)
        reason = f"was ended by {signal.Signals(-code).name if known else f'signal {-code}'}"
    told = f"Its last words: {lines[-1]}" if lines else "It may have run out of memory."
    return "failed", DitherError("the job", reason, told).to_json()


def _progress(path: Path, state: str) -> tuple[dict[str, Any], float | None]:
    said = _object(_read_json(path, 2**16))
    done, total = (value if isinstance(value, int) else 0 for value in (said.get("done"), said.get("total")))
    if state == "done":
        done = total
    left, at = said.get("left"), said.get("at")
    eta = None
    if state == "running" and isinstance(left, (int, float)) and isinstance(at, (int, float)):
        eta = round(max(0.0, left - max(0.0, time.time() - at)), 1)
    return {"done": done, "total": total, "what": _clean(str(said.get("what", "")))}, eta


def _made(place: Path) -> str | None:
    """The file or folder a job made, where its result names one."""
    found = _object(_read_json(place / "result.json", _LARGEST))
    named = (part.get("path") for part in (found, *found.values()) if isinstance(part, dict))
    return next((path for path in named if isinstance(path, str) and path), None)


def _lines(path: Path) -> list[str]:
    """The end of a log, as text without control characters."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LINES * LONGEST_LINE))
        text = file.read(LINES * LONGEST_LINE).decode("utf-8", "replace")
        lines = [_clean(line.rstrip("\r").rpartition("\r")[2]).rstrip()[:LONGEST_LINE] for line in text.split("\n")]
        return [line for line in lines if line][-LINES:]
    return []


def _clean(text: str) -> str:
    return _CONTROL.sub("", text)


def _read_json(path: Path, limit: int) -> object:
    """What a JSON file holds; None where it is missing, too large or not whole."""
    with contextlib.suppress(SourceError):
        found: object = parse_json(read_bytes(path, limit, ""), str(path), finite=False)
        return found
    return None


def _object(found: object) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}
