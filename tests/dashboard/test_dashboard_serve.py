"""Ports, a lean start, folders that are watched, and the page put into one file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dashboard.conftest import BUNDLED
from dither.dashboard import serve
from dither.dashboard.watch import Watch
from dither.errors import OutputError, UsageError
from dither.reporting import single_file


def test_a_port_that_was_named_must_be_free_and_the_default_one_moves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(serve.bind("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=r"in use.*--port"):
            serve.bind("127.0.0.1", port)
        monkeypatch.setattr(serve, "PORT", port)
        with contextlib.closing(serve.bind("127.0.0.1", None)) as other:
            assert port < other.getsockname()[1] < port + 20
        monkeypatch.setattr(serve, "_TRIED", 1)
        with pytest.raises(UsageError, match="in use"):
            serve.bind("127.0.0.1", None)
    with pytest.raises(UsageError, match="--host"):
        serve.bind("no-such-host.invalid", 0)
    with pytest.raises(UsageError, match="--host"):
        serve.bind("192.0.2.1", 0)  # an address of nobody (RFC 5737)


def test_a_job_does_not_keep_the_port() -> None:
    with contextlib.closing(serve.bind("127.0.0.1", 0)) as bound:
        assert not bound.get_inheritable()
        assert bound.family == socket.AF_INET


@pytest.mark.slow
def test_it_starts_and_shows_a_document_without_torch(made: Path) -> None:
    code = (
        "import sys; from dither.dashboard import serve; from dither.dashboard.results import Results;"
        "runs = Results([sys.argv[1]], sys.argv[2]).document()['runs'];"
        "print(len(runs), [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    given = [sys.executable, "-c", code, str(made), str(BUNDLED)]
    assert subprocess.run(given, capture_output=True, text=True, check=True).stdout.strip() == "2 []"


def test_a_change_counts_once_it_has_come_to_rest(tmp_path: Path) -> None:
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    watch = Watch([tmp_path])
    assert not watch.changed()
    (below / "x.gguf").write_bytes(b"1")
    assert not watch.changed()  # it may still be growing
    (below / "x.gguf").write_bytes(b"22")
    assert not watch.changed()
    assert watch.changed()
    assert not watch.changed()
    (below / "x.gguf.measure.json").write_text("{}")
    assert [watch.changed(), watch.changed()] == [False, True]
    (below / "sensitivity.0a1b.json").write_text("{}")  # KL by tensor, as a plan measures it
    assert [watch.changed(), watch.changed()] == [False, True]
    for name in ("x.gguf.part", ".hidden.gguf", "notes.txt"):
        (below / name).write_text("")
    (below / "c").mkdir()
    (below / "c" / "deep.gguf").write_text("")  # deeper than runs are looked for
    assert [watch.changed(), watch.changed()] == [False, False]
    (below / "x.gguf").unlink()
    assert [watch.changed(), watch.changed()] == [False, True]


def test_a_file_is_watched_with_what_stands_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"1")
    watch = Watch([path])
    (tmp_path / "x.gguf.answers.json").write_text("{}")
    assert [watch.changed(), watch.changed()] == [False, True]
    os.utime(path, (1, 1))
    assert [watch.changed(), watch.changed()] == [False, True]


def test_what_stands_in_the_document_cannot_leave_its_element() -> None:
    hostile = "</script><script>alert(1)</script><!--<script></SCRIPT >"
    found = single_file.escaped(json.dumps({"name": hostile}))
    assert not re.search(r"<(/?script|!--)", found, re.IGNORECASE)
    assert json.loads(found) == {"name": hostile}


def test_numbers_that_json_has_not_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        single_file.assemble({"value": float("nan")})


def test_modules_become_one_script_that_does_the_same(tmp_path: Path) -> None:
    sources = {
        "main.js": 'import {twice as double} from "./views/a.js";\n'
        'import("./views/b.js").then((b) => b.mount());\n'
        'import {\n  names,\n} from "./c.js";\nconsole.log(double(4), names);\n',
        "views/a.js": 'import {names} from "../c.js";\nexport function twice(x) { return names.two * x; }\n',
        "views/b.js": "export async function mount() { throw new Error(); }\nexport const unused = 1;\n",
        "c.js": "export const names = {two: 2};\n",
    }
    script = single_file.bundle(sources)
    assert 'const {twice: double} = dither("views/a.js");' in script
    assert 'const {names} = dither("c.js");' in script
    assert not re.search(r"^\s*(import|export)\b", script, re.MULTILINE)
    assert "return {mount, unused};" in script
    for line in ("export default 1;", 'import x from "./c.js";', "export {x};", 'import * as all from "./c.js";'):
        with pytest.raises(OutputError, match="cannot be bundled"):
            single_file.bundle({"main.js": line})
