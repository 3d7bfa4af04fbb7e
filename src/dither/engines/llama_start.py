"""How llama.cpp's server is started in this process: its parameters, and why a load failed.

Source: `common/common.h` in llama.cpp (`common_params`), which the `xllamacpp` wheel hands on field by field.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dither.engines.settings import Settings
from dither.errors import DitherError, UsageError
from dither.formats.gguf import read_header

DEFAULT_CONTEXT = 4096  # tokens; a model trained on fewer gets its own number
_LEAST_CONTEXT = 2  # llama.cpp computes two tokens while it loads, and aborts where they have no room
_SILENT, _ERRORS = -1, 1  # llama.cpp's verbosity


class EngineError(DitherError):
    """llama.cpp is missing, refuses the file, or fails while it runs."""


def start(path: Path, asked: Settings, key: str) -> Any:
    """A running server that answers only to `key`.

    llama.cpp tells why a load failed on stderr alone, so a failed load is repeated with stderr caught: nothing is
    redirected while things go well."""
    xllamacpp, params = _xllamacpp(), _parameters(path, asked, key)
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        params.verbosity = _ERRORS
        with _caught_stderr() as caught:
            with contextlib.suppress(RuntimeError):
                xllamacpp.Server(params)
            # verbosity is one variable of the process, set by the last load: fail once more, in silence
            params.verbosity, params.model.path = _SILENT, os.devnull
            with contextlib.suppress(RuntimeError):
                xllamacpp.Server(params)
        raise EngineError(
            str(path),
            f"llama.cpp cannot load it: {_reason(caught) or error}",
            "`dither inspect` tells whether the file is whole and which architecture it is.",
        ) from None


def _parameters(path: Path, asked: Settings, key: str) -> Any:
    params = _xllamacpp().CommonParams()
    params.model.path = os.fspath(path)
    slots = asked.slots or 1
    params.n_parallel = slots
    params.n_ctx = slots * max(asked.context or DEFAULT_CONTEXT, _LEAST_CONTEXT)  # llama.cpp divides it among them
    params.n_threads_http = 2 if slots == 1 else slots + 4  # a running answer occupies one
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked.threads
    wanted = asked.gpu_layers if asked.gpu_layers >= 0 or accelerated() else 0
    params.n_gpu_layers, params.fit_params = wanted, wanted < 0
    params.verbosity = _SILENT
    params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [key]
    params.endpoint_props, params.endpoint_slots, params.ui = True, True, False
    params.endpoint_metrics = asked.metrics
    params.offline, params.warmup = True, False
    params.cache_ram_mib = 0  # prompts of earlier conversations are not worth gigabytes here
    params.cache_type_k = params.cache_type_v = _cache_type(asked.kv)
    params.lora_adapters = [_lora(adapter) for adapter in asked.loras]
    if asked.alias:
        params.model_alias = {asked.alias}
    if asked.embeddings:
        _embed(params, path)
    return params


def _xllamacpp() -> Any:
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # or an assertion that fails calls a debugger first
    try:
        import xllamacpp
    except ImportError as error:
        raise EngineError(
            "llama.cpp", f"its wheel cannot be imported ({error})", "Install it with: pip install xllamacpp"
        ) from error
    return xllamacpp


def _cache_type(kv: str) -> Any:
    kinds = _xllamacpp().ggml_type
    known = {"f16": kinds.GGML_TYPE_F16, "q8_0": kinds.GGML_TYPE_Q8_0, "q4_0": kinds.GGML_TYPE_Q4_0}
    if kv not in known:
        raise UsageError(f"--kv {kv}", "is not a type that the cache can have", f"Choose one of {', '.join(known)}.")
    return known[kv]


def _lora(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise EngineError(str(path), "there is no such file", "Give the path of a LoRA adapter as GGUF.")
    adapter = _xllamacpp().CommonAdapterLoraInfo()
    adapter.path, adapter.scale = os.fspath(path), 1.0
    return adapter


def _embed(params: Any, path: Path) -> None:
    """llama.cpp must see a text in one batch to pool over it; a chat model, which names no pooling, gets
    the mean of its tokens."""
    metadata = read_header(path).metadata
    architecture = metadata.get("general.architecture")
    params.embedding = True
    params.n_batch = params.n_ubatch = params.n_ctx // params.n_parallel
    if architecture is None or f"{architecture.value}.pooling_type" not in metadata:
        params.pooling_type = _xllamacpp().llama_pooling_type.LLAMA_POOLING_TYPE_MEAN


def accelerated() -> bool:
    kinds = _xllamacpp().ggml_backend_dev_type
    gpus = (kinds.GGML_BACKEND_DEVICE_TYPE_GPU, kinds.GGML_BACKEND_DEVICE_TYPE_IGPU)
    return any(device["type"] in gpus for device in _xllamacpp().get_device_info())


@contextlib.contextmanager
def _caught_stderr() -> Iterator[list[str]]:
    """What C code writes to file descriptor 2 inside the block, as lines in the yielded list."""
    lines: list[str] = []
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            time.sleep(0.2)  # llama.cpp logs from a thread of its own
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines.extend(file.read().decode("utf-8", "replace").splitlines())


def _reason(lines: Sequence[str]) -> str:
    """The most telling of llama.cpp's error lines (`time E function: message`): the first one that
    says more than that the load failed."""
    errors = [line.split(" E ", 1)[1].strip() for line in lines if " E " in line]
    telling = [line for line in errors if "failed to load model" not in line]
    return (telling or errors or [""])[0].split(": ", 1)[-1].removeprefix("error loading model: ")
