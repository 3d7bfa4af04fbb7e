"""One large GGUF as several: `name-00001-of-00003.gguf` and so on, which llama.cpp loads as one model.

The hub takes no file above 50 GB, some file systems none above 4 GiB.  Every part is a GGUF of its own;
the first carries the model's metadata, and each of them three keys more: split.no (counted from 0) and
split.count as UINT16, split.tensors.count of all parts together as INT32.  A tensor is never cut: its
rows stay together, in the order they had, so parts differ in size by up to one tensor.  Nothing is
encoded anew: the bytes of every tensor are copied.

Source: llama.cpp, tools/gguf-split and the loader in src/llama-model-loader.cpp, which insist on these
names, keys and types.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dither.errors import OutputError, UsageError
from dither.formats.ggml import Field, ValueType
from dither.formats.gguf import ALIGNMENT_KEY, Header, Layout, TensorEntry, lay_out, padded, parse_header
from dither.formats.mapped import MappedFile
from dither.progress import Progress, Silent
from dither.system.files import replacing
from dither.units import format_bytes

NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
MOST_PARTS = 999  # far above any model's need; the names have room for five digits
_COPIED = 16 * 2**20  # bytes in memory at a time


@dataclass(frozen=True)
class SplitPart:
    """A file to come: its name, its first bytes, and where the tensors' bytes go."""

    path: Path
    entries: tuple[TensorEntry, ...]
    layout: Layout


def plan_parts(path: str | Path, folder: str | Path, limit: int) -> list[SplitPart]:
    """Into which parts of at most `limit` bytes a GGUF would be cut, or one part where it fits.

    Raises FormatError where the file is none, UsageError where it is a part itself or where a single
    tensor is larger than the limit.
    """
    path, folder = Path(path), Path(folder)
    header = parse_header(MappedFile(path).data, str(path))
    if COUNT in header.metadata:
        raise UsageError(str(path), "is one part of a model already", "Hand the parts over as they are.")
    groups = _groups(path, header, limit)
    if len(groups) > MOST_PARTS:
        reason = f"would become {len(groups)} parts of {format_bytes(limit)}"
        raise UsageError(str(path), reason, f"Ask for larger ones: at most {MOST_PARTS} are made.")
    parts = []
    for number, group in enumerate(groups):
        name = f"{path.stem}-{number + 1:05d}-of-{len(groups):05d}.gguf"
        metadata = _metadata(header, number, len(groups))
        infos = [(entry.name, entry.shape, entry.kind.name) for entry in group]
        parts.append(SplitPart(folder / name, tuple(group), lay_out(metadata, infos)))
    return parts


def _groups(path: Path, header: Header, limit: int) -> list[list[TensorEntry]]:
    """Tensors in the file's order, as many to a part as stay within the limit."""
    first = header.data_offset + 256  # of metadata and directory; the three keys are in the 256
    room = limit - first
    groups: list[list[TensorEntry]] = [[]]
    for entry in sorted(header.tensors, key=lambda entry: entry.offset):
        size = padded(entry.nbytes, header.alignment)
        if size > limit - first:
            reason = f"its tensor {entry.name} and header alone take {format_bytes(size + first)}"
            raise UsageError(str(path), reason, f"Ask for parts larger than {format_bytes(limit)}.")
        if size > room:
            groups.append([])
            room = limit - first
        groups[-1].append(entry)
        room -= size
    return groups


def _metadata(header: Header, number: int, count: int) -> Mapping[str, Field]:
    own = {
        NUMBER: Field(ValueType.UINT16, number),
        COUNT: Field(ValueType.UINT16, count),
        TENSORS: Field(ValueType.INT32, len(header.tensors)),
    }
    if number == 0:
        return {**header.metadata, **own}
    alignment = {ALIGNMENT_KEY: header.metadata[ALIGNMENT_KEY]} if ALIGNMENT_KEY in header.metadata else {}
    return {**alignment, **own}


def split(path: str | Path, folder: str | Path, limit: int, *, progress: Progress | None = None) -> list[Path]:
    """Writes the parts of a GGUF into `folder`, each under a temporary name until it is whole.

    A part that an earlier run finished from the same file is kept.  Raises as `plan_parts`, and
    OutputError where the disk is too small or a part cannot be written.
    """
    path, folder, report = Path(path), Path(folder), progress or Silent()
    parts = plan_parts(path, folder, limit)
    folder.mkdir(parents=True, exist_ok=True)
    todo = [part for part in parts if not _is_there(part, path)]
    needed, free = sum(part.layout.total for part in todo), shutil.disk_usage(folder).free
    if needed > free:
        reason = f"has {format_bytes(free)} free; the parts take {format_bytes(needed)}"
        raise OutputError(str(folder), reason, "Name a folder on a larger disk.")
    report.start(sum(part.layout.total for part in parts), 0)
    source = MappedFile(path)
    for part in parts:
        if part in todo:
            _write(part, source, report)
        else:
            report.advance(part.layout.total, part.path.name)
    return [part.path for part in parts]


def _is_there(part: SplitPart, source: Path) -> bool:
    """Whether a finished part of this very file stands: it got its name once it was whole."""
    try:
        there, now = part.path.stat(), source.stat()
        if there.st_size != part.layout.total or there.st_mtime_ns < now.st_mtime_ns:
            return False
        with part.path.open("rb") as file:
            return file.read(len(part.layout.header)) == part.layout.header
    except OSError:
        return False


def _write(part: SplitPart, source: MappedFile, report: Progress) -> None:
    with replacing(part.path, "Free some space, or name another folder.") as file:
        file.write(part.layout.header)
        for entry, offset in zip(part.entries, part.layout.offsets, strict=True):
            file.seek(offset)
            for at in range(0, entry.nbytes, _COPIED):
                size = min(_COPIED, entry.nbytes - at)
                file.write(source.read(entry.offset + at, size).data)
                report.advance(size, part.path.name)
        file.truncate(part.layout.total)
