"""Names out of strangers' files, through the commands that print them: nothing that a terminal would obey comes out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from dither.cli import app

# Colors, titles, a clipboard, a line overwritten, a C1 control, a text turned around, rich's own markup
EVIL = "a\x1b[2Jb\x1b]0;owned\x07c\x1b]52;c;eA==\x07d\re\x9b31mf\u202eg\x08h[bold red]i[/]"
OBEYED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF and a folder whose every text is hostile."""
    folder = tmp_path_factory.mktemp("evil")
    writer = gguf.GGUFWriter(folder / "evil.gguf", "llama")
    writer.add_name(EVIL)
    for key in ("general.description", "general.author", "general.license", "tokenizer.ggml.model", "dither.recipe"):
        writer.add_string(key, EVIL)
    writer.add_string("dither.measure", json.dumps({"file": EVIL, "schema_version": 1}))
    writer.add_string(EVIL, EVIL)
    writer.add_chat_template(EVIL)
    writer.add_token_list([EVIL, "b"])
    writer.add_tensor(f"blk.0.{EVIL}.weight", np.zeros((32, 32), np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = folder / "checkpoint"
    made.mkdir()
    config = {"architectures": [EVIL], "model_type": EVIL, "torch_dtype": EVIL, "quantization_config": {"a": EVIL}}
    (made / "config.json").write_text(json.dumps(config))
    header = json.dumps({EVIL: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (made / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (folder / "evil.gguf.measure.json").write_text(json.dumps({"schema_version": 1, "file": EVIL, EVIL: EVIL}))
    (folder / "plan.toml").write_text(f"format = 1\nmodel = {json.dumps(EVIL)}\n{json.dumps(EVIL)} = 1\n")
    return folder


COMMANDS = [
    ["inspect", "evil.gguf"],
    ["inspect", "evil.gguf", "--tensors"],
    ["inspect", "checkpoint"],
    ["fit", "evil.gguf"],
    ["fit", "checkpoint"],
    ["quantize", "evil.gguf", "--to", "Q4_K_M"],
    ["quantize", "checkpoint", "--to", "Q4_K_M"],
    ["quantize", "evil.gguf", "--plan", "plan.toml"],
    ["quantize", "evil.gguf", "--to", EVIL],
    ["measure", "evil.gguf", "--against", "checkpoint"],
    ["report", "."],
    ["convert", "evil.gguf", "--to", "gptq"],
    ["inspect", EVIL],
    ["serve", "evil.gguf", "--port", "0"],
]


@pytest.mark.parametrize(
    "words", COMMANDS, ids=[" ".join(words)[:30].encode("unicode_escape").decode() for words in COMMANDS]
)
def test_a_terminal_obeys_no_name(evil: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(evil)
    found = CliRunner().invoke(app, words)
    assert not isinstance(found.exception, Exception) or isinstance(found.exception, SystemExit), found.exception
    assert not OBEYED.search(found.stdout), repr(found.stdout)
    assert not OBEYED.search(found.stderr), repr(found.stderr)
    for made in evil.glob("*Q4_K_M*"):
        made.unlink()
