"""What a file is that is not what its name says, told by its first bytes.

What goes wrong with a model is most often not its bytes but how it came here: a repository cloned without git-lfs
leaves a note of 130 bytes under the name of every large file, a download of a gated one a web page, a full disk
nothing at all.  A parser that was promised a model would speak of header lengths; a person is helped by the
name of the thing and the command that gets the right one.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import TypeAlias

from dither.errors import FormatError

Start: TypeAlias = bytes | mmap.mmap

_LOOKED_AT = 512  # bytes
_POINTER = b"version https://git-lfs.github.com/spec/"
_PULL = "Get the file itself: run `git lfs install` and `git lfs pull` in the repository, or name its hub id instead."
_FETCH = "Fetch it again, and look at the address and at whether it wants a token."
_OLD = "It is from before August 2023: take a GGUF of the model, or convert the original checkpoint again."


def what_it_is(start: Start) -> tuple[str, str] | None:
    """Why the file that begins so is no model, and the way out; None for bytes that are not recognized."""
    head = bytes(start[:_LOOKED_AT])
    return next(((reason, way_out) for is_it, reason, way_out in _KINDS if is_it(head)), None)


def refuse_mistaken(start: Start, file: str) -> None:
    """Raises FormatError where the bytes are of some other kind of file, which is named."""
    found = what_it_is(start)
    if found is not None:
        raise FormatError(file, *found)


def refuse_pointer(start: Start, file: str) -> None:
    """Raises FormatError for a pointer of git-lfs, which may stand under any file's name."""
    if bytes(start[: len(_POINTER)]) == _POINTER:
        raise FormatError(file, *_POINTED)


def _begins(*magics: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(magics)


def _is_page(head: bytes) -> bool:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body"))


_POINTED = ("is a pointer of git-lfs, not the file: the repository was cloned without its large files", _PULL)
_KINDS: tuple[tuple[Callable[[bytes], bool], str, str], ...] = (
    (lambda head: not head, "is empty", "The download failed, or the disk was full: fetch it again."),
    (_begins(_POINTER), *_POINTED),
    (_is_page, "is a web page that was saved under this name", _FETCH),
    (
        _begins(b"lmgg", b"fmgg", b"tjgg", b"algg"),
        "is a legacy ggml file, from before GGUF, which cannot be read",
        _OLD,
    ),
    (
        _begins(b"PK\3\4", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"),
        "is a pickle or a zip archive, as PyTorch saves weights, and loading a pickle can run any code hidden in it",
        "Take the model's safetensors or a GGUF of it; an archive has to be unpacked first.",
    ),
    (
        _begins(b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"Rar!"),
        "is a compressed archive",
        "Unpack it first, and name what was in it.",
    ),
    (
        lambda head: len(head) >= 64 and not head.strip(b"\0"),
        "begins with nothing but zeros: its download was begun and never finished",
        "Fetch it again.",
    ),
)
