"""Ten seconds of what `benchmarks/serve_load.py` does for two minutes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux's /proc"),
]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("serve_load", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_load"] = module
    spec.loader.exec_module(module)
    return module


def test_sixty_four_clients_get_their_own_answers(bundled: Path) -> None:
    result = script().run(bundled, clients=64, seconds=10)
    assert result["wrong"] == [] and result["exit_code"] == 0
    assert result["answers"]["whole and its own"] > 20 and result["answers"]["left by the client"] > 0
    assert result["answers"]["refused, to come again"] > 0  # 64 clients, 8 slots, a queue of 32
    assert result["longest_queue"] <= result["queue"]
    assert set(result["left"].values()) == {0}
