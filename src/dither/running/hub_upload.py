"""Upload of a file to the Hugging Face hub: what would be sent, in which parts, and then the upload.

What is sent is collected in a folder beside the file, `<file>.hub/`: hard links, the card, the measurements.  The
hub takes no file of more than 50 GB, so larger ones are split (`containers.split`).  The folder stays until it is
deleted, because an interrupted upload resumes from it: what the hub has already is not sent again.  Nothing is sent
unless it was asked for explicitly, and never while HF_HUB_OFFLINE is set.

Source: huggingface_hub, `upload_folder` (2.0 and later resume by themselves) and `upload_large_folder`
(before that).
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dither._version import __version__
from dither.containers.card import cell, table
from dither.containers.provenance import MEASUREMENT
from dither.containers.split import plan_parts, split
from dither.errors import OutputError, SourceError, UsageError
from dither.models.gguf_source import PART
from dither.models.hub.fetch import first_line
from dither.progress import Progress
from dither.running.link_or_copy import link_or_copy, write_text
from dither.system.files import bytes_of, writing
from dither.system.json_text import object_in
from dither.types import Model
from dither.units import format_bytes, format_count

SHARD_BYTES = 48 * 10**9  # the hub's limit is 50 GB
_MARK = "---\n"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_RECORDS = (".measure.json", ".bench.json")


@dataclass(frozen=True)
class Upload:
    """What is sent: name in the repository → bytes; `url` once it is there."""

    repo: str
    folder: Path
    files: Mapping[str, int]
    url: str = ""


def preview(model: Model, repo: str, limit: int = SHARD_BYTES) -> Upload:
    """What an upload would send; nothing is written, and no request is made.  Raises UsageError."""
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise UsageError(repo, "is not a name of a repository on the hub", "Write it as OWNER/NAME.")
    path = Path(model.origin)
    folder = path.with_name(f"{path.name}.hub")
    files = {"README.md": len(card(model, repo).encode())}
    for part in map(Path, model.files):
        if part.stat().st_size <= limit:
            files[part.name] = part.stat().st_size
        elif PART.fullmatch(part.name):
            raise UsageError(str(part), f"is a part of more than {format_bytes(limit)}", "Ask for larger parts.")
        else:
            files |= {cut.path.name: cut.layout.total for cut in plan_parts(part, folder, limit)}
    files |= {record.name: record.stat().st_size for record in _records(path)}
    return Upload(repo, folder, files)


def _records(path: Path) -> list[Path]:
    """The measurement and the benchmark beside a file, if there are any."""
    found = (path.with_name(path.name + suffix) for suffix in _RECORDS)
    return [record for record in found if record.is_file()]


def upload(model: Model, repo: str, report: Progress, *, private: bool = False, limit: int = SHARD_BYTES) -> Upload:
    """Collects the files and sends them.  Raises UsageError offline, SourceError if the hub refuses, OutputError if
    the folder cannot be written."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the library is first imported
    import huggingface_hub
    from huggingface_hub import constants, errors

    # The library's transport may have its own errors, which are not OSErrors.
    failures = (OSError, RuntimeError, ValueError, getattr(errors, "HTTPError", OSError))
    planned = preview(model, repo, limit)
    if constants.HF_HUB_OFFLINE:
        raise UsageError("HF_HUB_OFFLINE", "is set: nothing is sent", "Unset it to upload.")
    _stage(model, planned, limit, report)
    # The library finds HF_ENDPOINT, HF_TOKEN and a login by itself.
    hub = huggingface_hub.HfApi(library_name="dither", library_version=__version__)
    report.note(f"sending {len(planned.files)} files to {repo}; run it again where it breaks off")
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        resumable = getattr(hub, "upload_large_folder", None)
        if resumable is not None:
            resumable(repo_id=repo, folder_path=planned.folder, repo_type="model")
            url = f"{hub.endpoint}/{repo}"
        else:
            message = f"Upload {Path(model.origin).name} with Dither"
            sent = hub.upload_folder(repo_id=repo, folder_path=planned.folder, commit_message=message)
            url = str(getattr(sent, "repo_url", "") or f"{hub.endpoint}/{repo}")
    except failures as error:
        way_out = "Check the name, and HF_TOKEN's right to write; the same command goes on where this stopped."
        # The library says "Error while uploading …", and the reason in the error behind it.
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise SourceError(repo, f"cannot be uploaded to ({first_line(cause)})", way_out) from None
    return replace(planned, url=url)


def _stage(model: Model, planned: Upload, limit: int, report: Progress) -> None:
    path, folder = Path(model.origin), planned.folder
    with writing(folder, "Check the folder."):
        folder.mkdir(exist_ok=True)
        strangers = {item.name for item in folder.iterdir()} - {*planned.files, ".cache", ".gitattributes"}
    if strangers:
        raise OutputError(str(folder), f"holds {min(strangers)!r}, which is not to be sent", "Move it away.")
    for part in map(Path, model.files):
        if part.stat().st_size > limit:
            split(part, folder, limit, progress=report)
        else:
            link_or_copy(part, folder / part.name)
    for record in _records(path):  # copied: they are small, and a link would point to an old version
        (folder / record.name).write_bytes(record.read_bytes())
    write_text(card(model, planned.repo), folder / "README.md", _MARK)


def card(model: Model, repo: str) -> str:
    """The README.md of a GGUF, with every figure from the file itself."""
    size = sum(tensor.stored_bytes for tensor in model.tensors)
    types = Counter(tensor.stored for tensor in model.tensors)
    rows = [
        ("made from", str(model.value("general.name", model.name))),
        ("architecture", model.arch),
        ("weights", format_count(model.parameters)),
        ("size", format_bytes(bytes_of(model.files))),
        ("bits per weight", f"{8 * size / max(1, model.parameters):.2f}"),
        ("types", ", ".join(f"{count} × {kind}" for kind, count in types.most_common())),
    ]
    measured = object_in(model.value(MEASUREMENT))
    if isinstance(measured.get("kl_mean"), int | float):
        rows.append(("KL divergence from the original", f"{measured['kl_mean']:.4f} nats per token"))
    if isinstance(measured.get("same_top"), int | float):
        rows.append(("same most likely token", f"{100 * measured['same_top']:.1f} %"))
    front = {"library_name": "gguf", "tags": ["gguf", "quantized", "dither"]}
    base = model.value("general.base_model.0.repo_url") or model.value("general.name", model.name)
    front["base_model"] = str(base).removeprefix("https://huggingface.co/")
    if isinstance(model.value("general.license"), str):
        front["license"] = model.value("general.license")
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    recipe = object_in(model.value("dither.recipe"))
    made = f"\nMade by Dither; the recipe:\n\n```json\n{json.dumps(recipe, indent=2)}\n```\n" if recipe else ""
    return f"{_MARK}{head}\n---\n\n# {cell(repo.rpartition('/')[2])}\n\n{table(rows)}\n{made}"
