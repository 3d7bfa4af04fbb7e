"""Text that a model writes itself is kept as it comes: an interrupted run ends with the very text, and files, of one
that nothing interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import BUNDLED
from dither.errors import OutputError
from dither.measuring.calibrate import calibrate
from dither.measuring.written import WRITTEN, Written
from killed import killed

ASKED = {"tokens": 2560, "context": 128, "threads": 2, "seed": 5, "hessians": False}  # 20 texts: two at once, in rounds
CALIBRATE = """
from dither.measuring import self_text
self_text._GOES_ON, self_text._ASKED_AT_ONCE = 48, 8
from dither.measuring.calibrate import calibrate
calibrate(sys.argv[2], out=sys.argv[3], progress=Killer(), **eval(sys.argv[4]))
"""


class Listener:
    """Stops the run like Ctrl-C at the moment of its choosing, of those when text was just written."""

    def __init__(self, stop_at: int = 0) -> None:
        self.notes: list[str] = []
        self.left, self.written = stop_at, 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, total: int, done: int) -> None:
        pass

    def advance(self, amount: int, what: str) -> None:
        if what == "writing text":
            self.written += 1
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


@pytest.mark.slow
def test_an_interrupted_writer_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dither.measuring.self_text._GOES_ON", 48)
    monkeypatch.setattr("dither.measuring.self_text._ASKED_AT_ONCE", 8)
    whole = Listener()
    calibrate(BUNDLED, out=tmp_path / "whole", progress=whole, **ASKED)
    assert whole.written >= 6
    # While the copy that writes is made, and in the middle of the writing: as kill -9 and as Ctrl-C leave it.
    killed(CALIBRATE, 3, BUNDLED, tmp_path / "early", ASKED)
    stopped = Listener(4)
    with pytest.raises(KeyboardInterrupt):
        calibrate(BUNDLED, out=tmp_path / "late", progress=stopped, **ASKED)
    kept = (tmp_path / "late" / WRITTEN).read_text().splitlines()
    assert len(kept) == 4 and (tmp_path / "late" / "writer.gguf").exists()
    for name in ("early", "late"):
        listener = Listener()
        calibrate(BUNDLED, out=tmp_path / name, progress=listener, **ASKED)
        assert contents(tmp_path / name) == contents(tmp_path / "whole"), name
        told = sum(map(len, (text for line in kept for text in json.loads(line)["written"])))
        said = any(f"{told} tokens of the text were kept" in note for note in listener.notes)
        assert said is (name == "late")


def answers(kept: Written, asked: list[int]) -> list[list[int]]:
    """What is kept, or 100 more than was asked: a writer that can be told from a kept answer."""
    return kept.answers({"prompt": asked}, lambda: [[number + 100 for number in asked]])


def test_answers_are_kept_in_order_and_only_to_what_was_asked(tmp_path: Path) -> None:
    kept = Written(tmp_path)
    assert [answers(kept, [1, 2]), answers(kept, [3])] == [[[101, 102]], [[103]]]
    place = tmp_path / WRITTEN
    place.write_text(place.read_text().replace("103", "7"))  # so that the kept answer shows
    again = Written(tmp_path)
    assert [answers(again, [1, 2]), answers(again, [3]), answers(again, [4])] == [[[101, 102]], [[7]], [[104]]]
    assert again.replayed == 3 and len(place.read_text().splitlines()) == 3
    other = Written(tmp_path)  # asks something else from the second on: what follows was another work's
    assert [answers(other, [1, 2]), answers(other, [5])] == [[[101, 102]], [[105]]]
    assert len(place.read_text().splitlines()) == 2
    place.write_text(place.read_text()[:-20])  # a line that a lost disk cut
    assert [answers(Written(tmp_path), [1, 2])] == [[[101, 102]]]
    assert len(Written(tmp_path)._kept) == 1
    with pytest.raises(OutputError):
        answers(Written(tmp_path / "nowhere"), [1])
