"""Models by name: `org/name`, fetched through huggingface_hub into its usual cache.

    org/name                  the default branch
    org/name@revision         a branch, a tag or a commit
    org/name:file.gguf        one GGUF of a repository that holds several
    hf://org/name             the same, where a local folder `org` would make it ambiguous

Only what a model needs is fetched: safetensors, JSON, tokenizer and template files, never pickle and
never Python.  HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean everywhere.  This
is the one place from which Dither reaches the network, and only when a person names a repository.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from dither.errors import DitherError, SourceError, UsageError
from dither.models.checkpoint import INDEX, PICKLES, WHOLE, refuse_pickle
from dither.models.gguf_source import PART, is_projector
from dither.system.text import shown

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"(?:hf://)?({_NAME}/{_NAME})(?:@([^:@\s]+))?(?::([^:\s][^:]*))?")
_NEEDED = re.compile(r"[^/\\]+\.(json|jinja|model|txt)|additional_chat_templates/[^/\\]+\.jinja")
_SHOWN_FILES = 30


@dataclass(frozen=True)
class HubId:
    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def parse_id(text: str) -> HubId | None:
    """The repository a text names, or None where it names none.

    >>> parse_id("org/name@v1:model.gguf")
    HubId(repo='org/name', revision='v1', file='model.gguf')
    """
    match = _ID.fullmatch(text)
    return HubId(match[1], match[2], match[3]) if match else None


def fetch(hub_id: HubId) -> tuple[Path, tuple[str, ...]]:
    """The local path of a repository's model, a folder or a GGUF file, and notes on how it was got.

    Downloads what is not cached yet.  Raises SourceError where the repository cannot be had or holds
    no readable model, UsageError where it holds several and none was chosen.
    """
    failures = hub_failures()
    import huggingface_hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return _cached(hub_id, "HF_HUB_OFFLINE forbids to ask the hub", "Unset HF_HUB_OFFLINE"), ()
    try:
        # Asks once; the library's own listing of files retries for half a minute without a network.
        found = huggingface_hub.HfApi().model_info(hub_id.repo, revision=hub_id.revision)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise _not_found(hub_id, error) from None
    except failures as error:
        path = _cached(hub_id, f"the hub cannot be reached ({first_line(error)})", "Connect to the network")
        return path, ("the hub could not be reached: an earlier download is used",)
    names = [file.rfilename for file in found.siblings or ()]
    wanted, chosen = choose(names, hub_id)
    left = [name for name in names if is_projector(name) and chosen and name not in wanted]
    notes = (f"{shown(left[0])} is beside the model, and is not fetched",) if left else ()
    try:
        folder = huggingface_hub.snapshot_download(
            hub_id.repo, revision=hub_id.revision, allow_patterns=[glob.escape(name) for name in wanted]
        )
    except errors.GatedRepoError as error:
        raise _not_found(hub_id, error) from None
    except failures as error:
        reason = f"could not be downloaded ({first_line(error)})"
        raise SourceError(hub_id.repo, reason, "Run it again: what is complete is kept.") from None
    return Path(folder, chosen), notes


def hub_failures() -> tuple[type[Exception], ...]:
    """What the hub's library raises where it cannot have something; imports it, without telemetry."""
    # Read when the library is first imported; without it, asking for a file also reports what we run on.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import errors

    # Where the library's transport has errors of its own, they are no OSErrors.
    return OSError, ValueError, getattr(errors, "HTTPError", OSError)


def choose(names: Iterable[str], hub_id: HubId) -> tuple[list[str], str]:
    """Which files of a repository to fetch, and which of them to open ("" for the whole folder).

    Raises SourceError where nothing is readable, UsageError where a choice is needed.
    """
    safe = [name for name in names if not PurePosixPath(name).is_absolute() and ".." not in name]
    weights = _weights(safe)
    if weights and hub_id.file is None:
        return weights + [name for name in safe if _NEEDED.fullmatch(name)], ""
    ggufs = _whole_models(name for name in safe if name.endswith(".gguf"))
    if hub_id.file is not None:
        parts = next((parts for parts in ggufs if hub_id.file in parts), None)
        if parts is None:
            raise _needs_choice(hub_id, ggufs, f"holds no GGUF called {shown(hub_id.file)}")
        return parts, hub_id.file
    ggufs = [parts for parts in ggufs if not is_projector(parts[0])] or ggufs
    if len(ggufs) == 1:
        return ggufs[0], ggufs[0][0]
    if ggufs:
        raise _needs_choice(hub_id, ggufs, f"holds {len(ggufs)} GGUF models")
    pickles = [name for name in safe if PurePosixPath(name).suffix in PICKLES]
    if pickles:
        raise refuse_pickle(hub_id.repo, pickles)
    raise SourceError(hub_id.repo, "holds neither safetensors nor GGUF", "Name a repository with a model.")


def _weights(names: Sequence[str]) -> list[str]:
    """The safetensors of the root that are the model, not a second copy of it in another form."""
    found = [name for name in names if re.fullmatch(r"[^/\\]+\.safetensors", name)]
    if WHOLE in found:
        return [WHOLE]
    return [name for name in found if INDEX not in names or not name.startswith("consolidated")]


def _whole_models(names: Iterable[str]) -> list[list[str]]:
    """GGUF files, those that are parts of one model together."""
    models: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names):
        match = PART.fullmatch(name)
        models.setdefault((match[1], match[3]) if match else (name, ""), []).append(name)
    return list(models.values())


def _needs_choice(hub_id: HubId, ggufs: Sequence[Sequence[str]], reason: str) -> UsageError:
    listed = ", ".join(shown(parts[0]) for parts in ggufs[:_SHOWN_FILES])
    more = f" and {len(ggufs) - _SHOWN_FILES} more" if len(ggufs) > _SHOWN_FILES else ""
    way_out = f"Choose one as {hub_id.repo}:FILE of {listed}{more}." if ggufs else "Look at its list of files."
    return UsageError(hub_id.repo, reason, way_out)


def _cached(hub_id: HubId, reason: str, remedy: str) -> Path:
    """What an earlier download left, without a request to anybody."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        # The pattern matches nothing: which files are needed is judged below, from those that are there.
        download = partial(huggingface_hub.snapshot_download, local_files_only=True, allow_patterns=["."])
        folder = Path(download(hub_id.repo, revision=hub_id.revision))
    except errors.HFValidationError as error:
        raise _not_found(hub_id, error) from None
    except OSError:
        way_out = f"{remedy} and run it once, or name a local path."
        raise SourceError(str(hub_id), f"is not in the cache, and {reason}", way_out) from None
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        return folder / choose(names, hub_id)[1]
    except DitherError as error:
        way_out = f"{remedy} and run it once. {error.way_out}"
        raise SourceError(str(hub_id), f"in the cache {error.reason}, and {reason}", way_out) from None


def _not_found(hub_id: HubId, error: Exception) -> SourceError:
    if "gated" in type(error).__name__.lower():
        way_out = "Accept its terms on the hub, and set HF_TOKEN to a token of the account that did."
        return SourceError(str(hub_id), "is gated", way_out)
    reason = f"is not on the hub ({first_line(error)})"
    way_out = "Check the name; for a private repository set HF_TOKEN. A local model needs a path that exists."
    return SourceError(str(hub_id), reason, way_out)


def first_line(error: Exception) -> str:
    return shown((str(error).strip() or type(error).__name__).splitlines()[0].rstrip("."))
