"""A model on the hub, judged from a few kilobytes: its headers, asked for by range.

`twin` makes a folder that looks like the repository to everything that reads headers: config.json and the
shards' index whole, every safetensors or GGUF with its real size and its real header, and holes where the
weights would be (a sparse file: it occupies what was written).  So the one parser for each format does its
work and its checks, and nothing else needs to know that the model is elsewhere.

A safetensors header says how long it is; a GGUF's does not, so its first bytes are asked for in growing
pieces until they parse.  A server that ignores the range is read no further than was asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dither.errors import FormatError, SourceError
from dither.formats import gguf, safetensors
from dither.formats.mapped import MappedFile
from dither.models.checkpoint import INDEX
from dither.models.hub import fetch
from dither.system.text import shown

_FIRST = 8 * 2**10  # bytes asked for first of a safetensors: small headers are in them whole
_PIECE = 256 * 2**10  # the same of a GGUF, whose header holds the vocabulary; doubled until it parses
_MOST_GGUF = 128 * 2**20  # bytes; ten times the largest header in use
_MOST_JSON = 64 * 2**20
_TIMEOUT = 30.0  # seconds
_AT_ONCE = 8  # requests; a large model has a hundred shards
_AGAIN = "Run it again, or name a local path."


@contextmanager
def twin(hub_id: fetch.HubId) -> Iterator[tuple[Path, int, list[str]]]:
    """A repository's headers as files, gone when the block ends; offline, what an earlier download left.

    Yields where to open the model, how many bytes were read, and what a person should know of it.
    Raises SourceError where the repository cannot be had or holds no readable model, UsageError where it
    holds several and none was chosen, FormatError where a header contradicts itself.
    """
    failures = fetch.hub_failures()
    import huggingface_hub
    from huggingface_hub import constants

    found = None
    with suppress(*failures):
        if not constants.HF_HUB_OFFLINE:
            found = huggingface_hub.HfApi().model_info(hub_id.repo, revision=hub_id.revision)
    if found is None:
        path, notes = fetch.fetch(hub_id)  # tells the reason, or finds an earlier download
        yield path, 0, list(notes)
        return
    names = [file.rfilename for file in found.siblings or ()]
    wanted, chosen = fetch.choose(names, hub_id)
    headers = [name for name in wanted if name.endswith((".safetensors", ".gguf"))]
    texts = [name for name in wanted if name in ("config.json", INDEX)]
    with tempfile.TemporaryDirectory(prefix="dither-headers-") as folder:
        reader = _Repository(hub_id.repo, found.sha or hub_id.revision, Path(folder))
        try:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(reader.text, texts))
                list(pool.map(reader.header, headers))
        except failures as error:
            reason = f"its headers could not be read ({fetch.first_line(error)})"
            raise SourceError(hub_id.repo, reason, _AGAIN) from None
        yield Path(folder, chosen), sum(reader.pieces), []


class _Repository:
    """One revision of a repository, read in pieces into a folder."""

    def __init__(self, repo: str, revision: str | None, folder: Path) -> None:
        from huggingface_hub import get_session, utils

        self.repo, self.revision, self.folder = repo, revision, folder
        self.session: Any = get_session()
        exported: Any = utils  # the function is public there, but not marked so for type checkers
        self.headers: dict[str, str] = exported.build_hf_headers()
        self.pieces: list[int] = []  # bytes of each answer; a list, because threads append to it

    def text(self, name: str) -> None:
        """A small file, whole."""
        content, size = self.piece(name, 0, _MOST_JSON)
        if size > _MOST_JSON:
            reason = f"has {size} bytes, more than the {_MOST_JSON} that are read"
            raise SourceError(f"{self.repo}, {shown(name)}", reason, "Check the repository.")
        self.place(name).write_bytes(content)

    def header(self, name: str) -> None:
        """The header of one file of weights, in a sparse file of the real one's size."""
        first, size = self.piece(name, 0, _FIRST if name.endswith(".safetensors") else _PIECE)
        path = self.place(name)
        with path.open("wb") as file:
            try:
                file.truncate(size)
            except OSError as error:
                reason = f"claims {size} bytes, which no file here can have ({error.strerror})"
                raise SourceError(f"{self.repo}, {shown(name)}", reason, "Check the repository.") from None
            file.write(first)
        if name.endswith(".safetensors"):
            self.rest_of_safetensors(name, path, len(first), size)
        else:
            self.rest_of_gguf(name, path, len(first), size)

    def rest_of_safetensors(self, name: str, path: Path, have: int, size: int) -> None:
        with path.open("rb") as file:
            end = 8 + int.from_bytes(file.read(8), "little")
        if have < end <= min(size, safetensors.MAX_HEADER + 8):  # else the parser says what is wrong
            self.append(name, path, have, end)

    def rest_of_gguf(self, name: str, path: Path, have: int, size: int) -> None:
        while have < size:
            try:
                # beyond what is there are zeros, which may look like a header's end
                if gguf.parse_header(MappedFile(path).data, name).data_offset <= have:
                    return
            except FormatError:
                if have >= min(size, _MOST_GGUF):
                    raise
            self.append(name, path, have, min(size, 2 * have))
            have = min(size, 2 * have)

    def append(self, name: str, path: Path, start: int, end: int) -> None:
        content, _ = self.piece(name, start, end)
        with path.open("r+b") as file:
            file.seek(start)
            file.write(content)

    def place(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def piece(self, name: str, start: int, end: int) -> tuple[bytes, int]:
        """Bytes `start` to `end` of a file, or fewer where it is shorter, and the whole file's size."""
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.repo, name, revision=self.revision)
        headers = {**self.headers, "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with _opened(self.session, url, headers) as (status, answered, chunks):
            if status not in (200, 206):
                raise SourceError(f"{self.repo}, {shown(name)}", f"the hub answers {status}", _AGAIN)
            whole = status == 200  # the range was ignored: skip to it, and hang up after it
            total = answered.get("content-length" if whole else "content-range", "").rpartition("/")[2]
            if not total.isdigit():
                raise SourceError(f"{self.repo}, {shown(name)}", "the hub does not tell its size", _AGAIN)
            content = _first_bytes(chunks, end if whole else end - start)
        self.pieces.append(len(content))
        content = content[start:end] if whole else content[: end - start]
        if len(content) < min(end, int(total)) - start:
            raise SourceError(f"{self.repo}, {shown(name)}", "the hub broke off", _AGAIN)
        return content, int(total)


def _first_bytes(chunks: Iterator[bytes], most: int) -> bytes:
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) >= most:
            break
    return bytes(content)


@contextmanager
def _opened(session: Any, url: str, headers: dict[str, str]) -> Iterator[tuple[int, Any, Iterator[bytes]]]:
    """A GET through the library's own session, whose kind changed: httpx since 1.0, requests before."""
    if callable(getattr(session, "stream", None)):
        with session.stream("GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT) as response:
            yield response.status_code, response.headers, response.iter_raw(2**16)
        return
    with session.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        yield response.status_code, response.headers, response.iter_content(2**16)
