"""`dither chat` with real models of known words: tiny Llamas whose next token is never in doubt."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from llama_util import CHATML, IM_END, SPECIAL, TinyLlama
from typer.testing import CliRunner, Result

from dither.cli import app
from dither.cli.harmless import harmless

pytestmark = pytest.mark.slow  # real processes or engines: `make test` runs it, `make check` does not

SAYS = "né €"
RUDE = "\x1b[2J\rok"  # clears the screen and overwrites the line, if obeyed
NEWLINE, COLON = (len(SPECIAL) + ord(letter) for letter in "\n:")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """polite answers SAYS, rude RUDE; base continues after a colon; endless never stops."""
    folder = tmp_path_factory.mktemp("models")
    for name, text in (("polite", SAYS), ("rude", RUDE)):
        TinyLlama(chat_template=CHATML).parrot(NEWLINE, text, end=IM_END).write(folder / f"{name}.gguf")
    TinyLlama().parrot(COLON, " yes!").write(folder / "base.gguf")
    endless = TinyLlama(chat_template=CHATML, context=2**16)
    endless.parrot(NEWLINE, "abc", end=len(SPECIAL) + ord("a")).write(folder / "endless.gguf")
    return folder


def chat(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["chat", *map(str, arguments), "--threads", "1"], input=stdin)


def test_one_prompt_prints_the_answer_alone(folder: Path) -> None:
    result = chat(folder / "polite.gguf", "-p", "hello", "-t", 0)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{SAYS}\n", "")


def test_a_prompt_may_come_through_a_pipe(folder: Path) -> None:
    result = chat(folder / "polite.gguf", "-t", 0, stdin="hello\n")
    assert (result.exit_code, result.stdout) == (0, f"{SAYS}\n")


def test_a_pipe_that_is_no_utf8_is_told_so(folder: Path) -> None:
    result = CliRunner().invoke(app, ["chat", str(folder / "base.gguf")], input=b"caf\xe9\n")
    assert result.exit_code == 2 and "standard input: is no UTF-8" in result.stderr


def test_json_is_one_document_with_the_figures(folder: Path) -> None:
    result = chat(folder / "rude.gguf", "-p", "hello", "-t", 0, "--seed", 7, "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 0
    assert document["answer"] == RUDE  # JSON escapes what a terminal would obey
    assert "\x1b" not in result.stdout
    assert document["tokens"] == len(RUDE) + 1 and document["stopped_by"] == "end"
    assert document["tokens_per_second"] > 0 and document["seed"] == 7
    assert document["model"].endswith("rude.gguf") and document["chat_template"] is True


def test_escape_sequences_of_the_model_are_shown_not_obeyed(folder: Path) -> None:
    assert chat(folder / "rude.gguf", "-p", "hello", "-t", 0).stdout == "␛[2J␍ok\n"


def test_every_control_character_but_newline_and_tab_is_made_harmless() -> None:
    everything = "".join(map(chr, range(0x110000)))
    after = harmless(everything)
    assert len(after) == len(everything)
    left = [c for c in after if (ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0)]
    assert left == ["\t", "\n"]
    assert "\u202e" not in after and "\u2066" not in after  # text that runs backwards
    assert all(c in after for c in "aé日👋\u200d\u0627")  # joiners and right-to-left letters are text


def test_a_base_model_continues_the_text_and_says_so_on_stderr(folder: Path) -> None:
    result = chat(folder / "base.gguf", "-p", "Well:", "-t", 0)
    assert result.stdout == " yes!\n"
    assert " ".join(result.stderr.split()).count("base.gguf has no chat template") == 1


def test_the_system_text_reaches_the_model(folder: Path) -> None:
    counts = [
        json.loads(chat(folder / "polite.gguf", "-p", "hello", "--json", *extra).stdout)["prompt_tokens"]
        for extra in ([], ["--system", "Be brief."])
    ]
    markers_and_role = 1 + len("system\n") + 1 + len("\n")
    assert counts[1] - counts[0] == len("Be brief.") + markers_and_role


def test_a_system_text_for_a_base_model_is_refused(folder: Path) -> None:
    result = chat(folder / "base.gguf", "-p", "Well:", "--system", "Be brief.")
    assert result.exit_code == 2 and "no chat template" in " ".join(result.stderr.split())


def test_max_tokens_cuts_the_answer(folder: Path) -> None:
    result = chat(folder / "endless.gguf", "-p", "hello", "-t", 0, "-n", 6)
    assert result.stdout == "abcabc\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing.gguf", "-p", "hello"], 1, "no such file"),
        ([".", "-p", "hello"], 1, "is a folder"),
        (["polite.gguf"], 2, "standard input: is empty"),
        (["polite.gguf", "-p", "hello", "-n", "0"], 2, "max-tokens"),
        (["polite.gguf", "-p", "hello" * 100], 1, "larger context"),
    ],
)
def test_mistakes_are_explained(folder: Path, arguments: list[str], code: int, message: str) -> None:
    result = chat(folder / arguments[0], *arguments[1:], stdin="")
    assert result.exit_code == code and result.stdout == ""
    assert message in " ".join(result.stderr.split())


def test_errors_under_json_are_json(folder: Path) -> None:
    result = chat(folder / "nothing.gguf", "-p", "hello", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["reason"] == "there is no such file"


class Terminal:
    """The command on a terminal of its own, as a person has it."""

    def __init__(self, *arguments: object) -> None:
        ours, theirs = pty.openpty()
        # the child takes the terminal itself, so that Ctrl-C reaches it as a signal
        code = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\nfrom dither.cli import main; main()"
        command = [sys.executable, "-c", code, "chat", *map(str, arguments)]
        environment = os.environ | {"TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        self.screen, self.seen = ours, ""

    def interrupt(self, text: str) -> None:
        """Ctrl-C until `text` comes: one that falls between prompt and read is seen by Python only later."""
        for _ in range(10):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                self.expect(text, seconds=2)
                return
        self.expect(text)

    def expect(self, text: str, seconds: float = 20) -> str:
        """What was shown up to and including `text`; fails after so many seconds of waiting for it."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.screen], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come; the screen shows {self.seen!r}"
            try:
                self.seen += os.read(self.screen, 4096).decode("utf-8", "replace")
            except OSError as closed:  # how Linux says that the other side is gone
                raise AssertionError(f"ended without {text!r}; the screen shows {self.seen!r}") from closed
        shown, self.seen = self.seen.split(text, 1)
        return shown + text

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            os.close(self.screen)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*arguments: object) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


def test_a_conversation_on_a_terminal(folder: Path, terminal: Callable[..., Terminal]) -> None:
    screen = terminal(folder / "polite.gguf", "-t", 0, "--threads", 1)
    screen.expect("Ctrl-D leaves.")
    screen.expect("> ")
    screen.type("hello\r")
    assert SAYS in screen.expect("tokens, ")
    screen.expect("> ")
    screen.type("/help\r")
    screen.expect("Ctrl-C stops an answer.")
    screen.type("/clear\r")
    screen.expect("forgotten")
    screen.type("/shout\r")
    screen.expect("/shout is no command")
    screen.expect("> ")
    screen.interrupt("/quit or Ctrl-D leaves")
    screen.expect("> ")
    screen.type("\x04")
    assert screen.process.wait(20) == 0


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(folder: Path, terminal: Callable[..., Terminal]) -> None:
    screen = terminal(folder / "endless.gguf", "-c", 60000, "-n", 50000, "-t", 0, "--threads", 1)
    screen.expect("> ")
    screen.type("hello\r")
    screen.expect("abcabc")
    screen.type("\x03")
    assert len(screen.expect("stopped")) < 50000
    screen.expect("> ")
    screen.type("/quit\r")
    assert screen.process.wait(20) == 0


def test_ctrl_c_ends_a_single_answer(folder: Path) -> None:
    command = [sys.executable, "-c", "from dither.cli import main; main()", "chat", str(folder / "endless.gguf")]
    options = ["-p", "hello", "-c", "60000", "-n", "50000", "-t", "0", "--threads", "1"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(4)
        process.send_signal(signal.SIGINT)
        rest, complaints = process.communicate(timeout=20)
    assert process.returncode == 130
    assert len(rest) < 50000 and rest.endswith(b"\n") and complaints == b""


def test_the_conversation_is_remembered_and_cleared(folder: Path) -> None:
    from dither.engines.llamacpp import LlamaCpp
    from dither.running.conversation import Conversation, Sampling

    with LlamaCpp(folder / "polite.gguf", threads=1) as engine:
        talk = Conversation(engine, Sampling(20, 0.0, 0), system="Be brief.")
        lengths = []
        for _ in range(3):
            reply = talk.say("hello")
            talk.turns.append(("hello", "".join(reply)))
            lengths.append(reply.prompt_tokens)
        assert lengths[1] - lengths[0] == lengths[2] - lengths[1] > len("hello") + len(SAYS)
        talk.turns.clear()
        again = talk.say("hello")
        assert "".join(again) == SAYS and again.prompt_tokens == lengths[0]


def test_two_answers_one_after_the_other_through_a_pipe(folder: Path) -> None:
    result = chat(folder / "polite.gguf", "--against", folder / "rude.gguf", "-p", "hello")
    assert (result.exit_code, result.stdout) == (0, f"{SAYS}\n␛[2J␍ok\n")
    told = " ".join(result.stderr.split())
    assert "polite.gguf:" in told and "rude.gguf:" in told and "The same for 0 words" in told


def test_two_answers_as_json_with_the_place_where_they_part(folder: Path) -> None:
    for other, character in (("rude", 0), ("polite2", None)):
        if other == "polite2":
            (folder / "polite2.gguf").write_bytes((folder / "polite.gguf").read_bytes())
        result = chat(folder / "polite.gguf", "--against", folder / f"{other}.gguf", "-p", "hello", "--json")
        document = json.loads(result.stdout)
        assert document["answer"] == SAYS and document["temperature"] == 0  # no dice between two models
        assert document["against"]["answer"] == (RUDE if other == "rude" else SAYS)
        assert document["divergence"]["character"] == character
        assert document["against"]["tokens"] == len(document["against"]["answer"].encode()) + 1


def test_side_by_side_on_a_terminal(folder: Path, terminal: Callable[..., Terminal]) -> None:
    screen = terminal(folder / "polite.gguf", "--against", folder / "rude.gguf", "--threads", 1)
    screen.expect("polite.gguf beside rude.gguf")
    screen.expect("> ")
    screen.type("hello\r")
    shown = screen.expect("in the same order.")
    assert f"▶⟨{SAYS.split()[0]}" in shown and "⟨␛[2J␍ok⟩" in shown and "\x1b[2J" not in shown
    screen.expect("> ")
    screen.type("/quit\r")
    assert screen.process.wait(20) == 0


def test_commands_switch_the_model_and_keep_the_conversation(
    folder: Path, tmp_path: Path, terminal: Callable[..., Terminal]
) -> None:
    for name, text in (("m-Q8_0", SAYS), ("m-Q4_0", "ok")):
        model = TinyLlama(chat_template=CHATML).parrot(NEWLINE, text, end=IM_END)
        model.write(tmp_path / f"{name}.gguf")
    TinyLlama(chat_template=CHATML, layers=1).write(tmp_path / "other-Q5_0.gguf")
    screen = terminal(tmp_path / "m-Q8_0.gguf", "-t", 0, "--threads", 1)
    for typed, expected in (
        ("/retry", "nothing was asked yet"),
        ("hello", SAYS),
        ("/switch Q6_K", "There are:"),
        (f"/switch {tmp_path / 'other-Q5_0.gguf'}", "another"),
        ("/switch q4_0", "1 turn kept"),
        ("/retry", "ok"),
        ("and you?", "ok"),
        ("/stats", "not readable here" if not Path("/sys/class/powercap").exists() else "energy:"),
        (f"/save {tmp_path / 'kept.json'}", "kept as"),
        (f"/save {tmp_path / 'kept.json'}", "already"),
        (f"/save {tmp_path / 'kept.md'}", "kept as"),
    ):
        screen.expect("> ")
        screen.type(f"{typed}\r")
        screen.expect("\n")  # the echo of what was typed
        screen.expect(expected)
    screen.expect("> ")
    screen.type("/quit\r")
    assert screen.process.wait(20) == 0
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["model"] == "m-Q4_0.gguf"
    assert [(m["role"], m["content"]) for m in kept["messages"]] == [
        ("user", "hello"),
        ("assistant", "ok"),
        ("user", "and you?"),
        ("assistant", "ok"),
    ]
    assert "**assistant:** ok" in (tmp_path / "kept.md").read_text()


def test_a_switch_that_fails_leaves_the_model_from_before(folder: Path, tmp_path: Path) -> None:
    from dither.engines.llamacpp import EngineError
    from dither.running.conversation import Seat

    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with Seat(folder / "polite.gguf", context=0, threads=1) as seat:
        with pytest.raises(EngineError):
            seat.switch(tmp_path / "broken.gguf")
        assert "".join(seat.engine.chat([{"role": "user", "content": "hello"}], temperature=0)) == SAYS
