"""Serves a GGUF in this process, lets it read a prompt that fills its context, and says what that took.

    python serve.py FILE CONTEXT KV SLOTS  →  one JSON line: resident bytes gained, buffers in MiB

The baseline is the process with the library loaded.  Resident memory is the process's own accounting
(`/proc/self/status`, Linux): mapped weights count once they have been touched, the cache once it has been
cleared, and the compute buffer once a whole batch has run at the end of a full context.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import IO, Any

import xllamacpp

LOG = 5  # verbosity at which llama.cpp names its buffers


def resident() -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def parameters(file: str, context: int, kv: str, slots: int) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = file, context * slots, slots
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kv.upper()}")
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.n_gpu_layers, params.fit_params, params.verbosity = 0, False, LOG
    params.hostnames, params.port, params.ui, params.offline = ["127.0.0.1"], 0, False, True
    params.warmup, params.cache_ram_mib, params.n_threads_http = False, 0, 2
    return params


def main(file: str, context: int, kv: str, slots: int) -> None:
    before = resident()
    log = tempfile.TemporaryFile()  # noqa: SIM115 — it lives as long as the process
    said = os.dup(2)
    os.dup2(log.fileno(), 2)
    try:
        report(file, context, kv, slots, before, log)
    except BaseException:
        os.dup2(said, 2)
        log.seek(0)
        sys.stderr.write(log.read().decode("utf-8", "replace")[-20_000:])
        raise


def report(file: str, context: int, kv: str, slots: int, before: int, log: IO[bytes]) -> None:
    server = xllamacpp.Server(parameters(file, context, kv, slots))
    with urllib.request.urlopen(server.listening_address + "/slots") as answer:
        length = json.loads(answer.read())[0]["n_ctx"]  # a slot has no more than the model was trained on
    random.seed(0)
    body = {
        "prompt": [random.randrange(100, 250) for _ in range(length - 32)],
        "n_predict": 0,
        "cache_prompt": False,  # random weights would continue with bytes that are no UTF-8
    }
    for slot in range(slots):
        request = urllib.request.Request(
            server.listening_address + "/completion",
            json.dumps({**body, "id_slot": slot}).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request).read()
    gained = resident() - before
    log.seek(0)
    text = log.read().decode("utf-8", "replace")
    buffers = {
        name: sum(float(size) for size in re.findall(rf"{pattern} buffer size = +([\d.]+) MiB", text))
        for name, pattern in (
            ("cache", "(?:KV|RS)"),
            ("compute", "compute"),
            ("output", "output"),
            ("weights", "model"),
        )
    }
    print(json.dumps({"resident": gained, "buffers": buffers}), flush=True)
    os._exit(0)  # the server's own way out waits for its threads


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
