"""Jobs: real processes that run to their end, fail with a reason, are cancelled, and are found again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dashboard.conftest import BUNDLED, FORMS
from dither.cli.reported import Reported
from dither.dashboard import processes
from dither.dashboard.jobs import MOST_WAITING, Jobs
from dither.errors import SourceError, UsageError
from dither.formats.gguf import read_header

SLEEP = """
import os, signal, sys, time
def end(*_):
    sys.stdin.read()  # asked to end, it takes until it is let go
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, end)
print("ready", flush=True)
time.sleep(60)
"""


def until(jobs: Jobs, job_id: str, reached: Callable[[dict[str, Any]], bool], seconds: float = 90) -> Any:
    """Ticks as the server does, until a job is so; every state seen on the way."""
    seen = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        jobs.tick()
        seen.append(jobs.get(job_id))
        if reached(seen[-1]):
            return seen
        time.sleep(0.05)
    raise AssertionError(seen[-1])


def sleeper() -> subprocess.Popen[str]:
    """A process that does nothing for a minute; asked to end it waits until its stdin is closed."""
    child = subprocess.Popen(
        [sys.executable, "-c", SLEEP],
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    with child.stdout as said:
        assert said.readline() == "ready\n"
    return child


def ended(job: dict[str, Any]) -> bool:
    return job["state"] not in ("waiting", "running")


def stored(jobs: Jobs, job_id: str, **changes: object) -> None:
    """A job on disk as another server would have left it."""
    record = {
        "id": job_id,
        "kind": "plan",
        "words": ["plan", "m", "--bpw", "4"],
        "folder": "/",
        "created": 1.0,
        "server": {"pid": os.getpid(), "since": "long ago"},
        "process": None,
        "cancelled": None,
        "ended": None,
        "code": None,
        **changes,
    }
    (jobs.folder / job_id).mkdir(parents=True)
    (jobs.folder / job_id / "job.json").write_text(json.dumps(record))


@pytest.mark.slow
def test_a_job_runs_to_its_end_and_its_file_is_whole(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    (tmp_path / "numpy.py").write_text("raise SystemExit('a module of a folder of models was run')")
    jobs = Jobs(FORMS, tmp_path / "state", work_in=tmp_path)
    jobs.told = told.append
    first = jobs.start("quantize", {"model": str(BUNDLED), "to": "Q8_0", "output": "a b.gguf"})
    second = jobs.start("quantize", {"model": str(tmp_path / "none"), "to": "Q8_0"})
    assert (first["state"], second["state"]) == ("running", "waiting")  # one at a time
    done = until(jobs, first["id"], ended)[-1]
    assert done["state"] == "done", done
    assert done["made"] == "a b.gguf" and read_header(tmp_path / "a b.gguf").tensors
    assert done["progress"]["done"] == done["progress"]["total"] > 0
    assert done["command"] == f"dither quantize {BUNDLED} --to Q8_0 --output 'a b.gguf'"
    told_of_it = [job for job in told if job["id"] == first["id"]]
    assert told_of_it[-1]["state"] == "done"
    changes = [job["changed"] for job in told_of_it]
    assert changes == sorted(set(changes))  # each younger than the one before it
    failed = until(jobs, second["id"], ended)[-1]
    assert failed["state"] == "failed"
    assert failed["error"]["thing"].endswith("none") and failed["error"]["reason"]
    # Another server, started later, knows both.
    later = Jobs(FORMS, tmp_path / "state")
    assert [job["state"] for job in later.all()] == ["failed", "done"]


def test_a_job_is_found_again_by_a_later_server_and_cancelled_there(tmp_path: Path) -> None:
    """Only its server is made up here; the process is real, and must hear of it as of Ctrl-C."""
    child = sleeper()
    process = {"pid": child.pid, "since": processes.started(child.pid), "started": time.time()}
    job_id = "20260101-000000-000000000001"
    stored(Jobs(FORMS, tmp_path), job_id, process=process)
    (tmp_path / job_id / "progress.json").write_text(
        json.dumps({"done": 3, "total": 12, "what": "blk.0", "left": 90.0, "at": time.time()})
    )
    try:
        later = Jobs(FORMS, tmp_path)
        later.tick()
        job = later.get(job_id)
        assert (job["state"], job["progress"]) == ("running", {"done": 3, "total": 12, "what": "blk.0"})
        assert 60 < job["eta_seconds"] <= 90
        waiting = later.start("quantize", {"model": "m", "to": "Q8_0"})
        assert waiting["state"] == "waiting"  # one at a time
        later.cancel(waiting["id"])
        assert later.cancel(job_id)["cancelling"]
        child.stdin.close()
        assert child.wait(20) == -signal.SIGINT
        cancelled = until(later, job_id, ended)[-1]
        assert cancelled["state"] == "cancelled" and cancelled["error"] is None
        assert later.cancel(job_id) == cancelled  # what has ended stays as it is
    finally:
        child.stdin.close()
        child.kill()
        child.wait()


def test_a_killed_job_says_so(tmp_path: Path) -> None:
    jobs = Jobs(FORMS, tmp_path)
    stored(jobs, "20260101-000000-00000000000a", process={"pid": 2**22, "since": "1", "started": 1.0}, code=-9)
    (tmp_path / "20260101-000000-00000000000a" / "log.txt").write_bytes(b"\x1b[31mnote:\x1b[0m block 3\r\n\x00\n")
    job = until(jobs, "20260101-000000-00000000000a", ended)[-1]
    assert job["state"] == "failed" and job["lines"] == ["note: block 3"]
    assert job["error"] == {
        "thing": "the job",
        "reason": "was ended by SIGKILL",
        "way_out": "Its last words: note: block 3",
    }


def test_a_process_of_the_same_number_is_not_the_same(tmp_path: Path) -> None:
    """Process numbers are used again; a stranger must neither count as the job nor be signalled."""
    child = sleeper()
    try:
        since = processes.started(child.pid)
        assert since and processes.alive(child.pid, since)
        jobs = Jobs(FORMS, tmp_path)
        process = {"pid": child.pid, "since": since + "0", "started": 1.0}
        stored(jobs, "20260101-000000-00000000000b", process=process)
        assert until(jobs, "20260101-000000-00000000000b", ended)[-1]["state"] == "failed"
        processes.end(child.pid, since + "0", signal.SIGKILL)
        assert child.poll() is None
        processes.end(child.pid, since, signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL
        assert not processes.alive(child.pid, since)
    finally:
        child.stdin.close()
        child.kill()
        child.wait()


def test_what_a_closed_server_left_waiting_does_not_begin_by_itself(tmp_path: Path) -> None:
    jobs = Jobs(FORMS, tmp_path)
    stored(jobs, "20260101-000000-00000000000c")
    assert jobs.all()[0]["state"] == "waiting" and jobs.running() == 0  # of which nobody says that it goes on
    assert until(jobs, "20260101-000000-00000000000c", ended)[-1]["state"] == "cancelled"


def test_a_waiting_job_is_cancelled_at_once_and_a_full_queue_refuses(tmp_path: Path) -> None:
    jobs = Jobs(FORMS, tmp_path)
    since = processes.started(os.getpid())
    running = {"pid": os.getpid(), "since": since, "started": time.time()}
    stored(jobs, "20260101-000000-00000000000d", process=running, server=jobs._me)
    fields = {"model": "m", "to": "Q8_0"}
    waiting = [jobs.start("quantize", fields) for _ in range(MOST_WAITING)]
    assert {job["state"] for job in waiting} == {"waiting"}
    with pytest.raises(UsageError, match="queue"):
        jobs.start("quantize", fields)
    assert jobs.cancel(waiting[0]["id"])["state"] == "cancelled"
    assert jobs.start("quantize", fields)["state"] == "waiting"


def test_strange_files_in_the_folder_are_no_jobs(tmp_path: Path) -> None:
    jobs = Jobs(FORMS, tmp_path)
    for name, text in (("20260101-000000-00000000000e", "{"), ("20260101-000000-00000000000f", "[]"), ("x", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.json").write_text(text)
    jobs.tick()
    assert jobs.all() == []
    for name in ("../x", "20260101-000000-00000000000e", ""):
        with pytest.raises(SourceError):
            jobs.get(name)
    with pytest.raises(UsageError, match="target"):
        jobs.start("quantize", {"model": "m"})


def test_progress_is_one_small_file_that_is_always_whole(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    told = Reported(str(path))
    for done in range(200):
        told.tell(done, 200, "blk.0.ffn_down", 5.0)
    told.tell(200, 200, "x" * 10_000, None)
    found = json.loads(path.read_text())
    assert (found["done"], found["total"], found["left"], len(found["what"])) == (200, 200, None, 500)
    assert [entry.name for entry in tmp_path.iterdir()] == ["progress.json"]
    Reported(str(tmp_path / "no" / "folder")).tell(1, 2, "", None)  # stops nothing
    Reported("").tell(1, 2, "", None)
