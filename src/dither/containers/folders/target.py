"""A folder of safetensors as the target of a run (see `containers.target.Target`)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dither._version import __version__
from dither.codecs import codec
from dither.containers.folders.consumers import check_network, loaders, refuse_unloaded, unloaded_notes
from dither.containers.folders.joined import stacks
from dither.containers.folders.mix import is_linear, make_folder_mix
from dither.containers.folders.output import Contents, FolderOutput, stored_as
from dither.containers.folders.scheme import Scheme, Wish
from dither.containers.folders.side import checkpoint_config, copies, linear_modules, made_files
from dither.containers.journal import remove_left_over
from dither.containers.mix import Mix, MixTensor, Options
from dither.containers.part_folder import refuse_others
from dither.containers.part_output import PartOutput
from dither.containers.provenance import method_of, recipe_json
from dither.containers.target import OutputSettings
from dither.errors import OutputError
from dither.formats.evidence import EvidenceStore
from dither.formats.ggml import FLOAT_TYPES
from dither.formats.safetensors import lay_out, nbytes
from dither.models.arch.written import Written, written
from dither.models.checkpoint import ABOUT, open_checkpoint
from dither.system.files import bytes_of
from dither.types import Model, No, Tensor, Yes

_ANY_COLUMNS = 4096  # of a matrix whose types are only to be named and ordered
_AROUND = 8 * 2**10  # bytes of a header and of documents besides what is said of tensors
_LISTED = 160  # bytes around a tensor's name where documents list it


@dataclass(frozen=True)
class FolderTarget:
    options: Options
    scheme: Scheme
    dtype: str  # of what stays numbers: told by the model as it was opened, for rewriting makes all float32
    remarks: tuple[str, ...] = ()  # on how that was chosen

    def wish(self) -> Wish:
        options = self.options
        return Wish(options.bits, options.group, options.sym, self.dtype, options.act_order)

    def check(self, model: Model) -> None:
        refuse_unloaded(self.scheme, model, self.options.tensors)

    def check_network(self, model: Model) -> list[str]:
        family, entries = written(model)
        return check_network(family, checkpoint_config(model, family, self.dtype), model, entries)

    def check_written(self, part: Path) -> None:
        open_checkpoint(part)  # every tensor where the index says, and of the size that its type makes

    def engines(self, model: Model) -> tuple[tuple[str, ...], str]:
        return loaders(self.scheme, model, self.options.tensors), self.scheme.needs

    def mix(self, model: Model, known: Collection[str]) -> Mix:
        mix = make_folder_mix(model, self.options, self.scheme, self.wish())
        notes = unloaded_notes(self.scheme, model, self.options.tensors)
        return replace(mix, remarks=(*mix.remarks, *self.remarks, *notes))

    def name(self, stem: str, label: str) -> str:
        return f"{stem}-{label}"

    def check_place(self, path: Path, named: str, inside: bool, force: bool) -> Path:
        if path.is_dir() and not (path / "config.json").is_file() and any(path.iterdir()):
            path = path / named
        if path.is_file():
            raise OutputError(str(path), "is a file; this container is a folder", "Choose another name.")
        if path.is_dir() and any(path.iterdir()):
            if not force:
                remove_left_over(path)
                raise OutputError(str(path), "exists already", "Choose another name with -o, or pass --force.")
            refuse_others(path)
        return path

    def open(self, path: Path, model: Model, mix: Mix, settings: OutputSettings) -> PartOutput:
        family, entries = written(model)
        wish = replace(self.wish(), method=method_of(json.loads(settings.recipe)))
        kinds = {tensor.name: tensor.type for tensor in mix.tensors}
        linear = linear_modules(model, entries)
        modules = {module: kinds[name] for module, name in linear.items() if kinds[name] not in FLOAT_TYPES}
        plain = [module for module, name in linear.items() if kinds[name] in FLOAT_TYPES]
        documents: dict[str, Any] = {ABOUT: {"version": __version__, "recipe": json.loads(settings.recipe)}}
        config = checkpoint_config(model, family, wish.dtype)
        if self.scheme.quantizes and modules:
            config["quantization_config"] = self.scheme.config(modules, plain, wish)
            documents |= self.scheme.documents(config["quantization_config"])
        documents["config.json"] = config
        contents = Contents(mix.tensors, entries, wish.dtype, documents, copies(model))
        output = FolderOutput(path, self.scheme, contents, settings.identity, settings.order)
        made_files(model, output.part)
        return output

    def types(self, model: Model, asked: Sequence[str] | None) -> tuple[str, ...]:
        wish = self.wish()
        names = (*self.scheme.choices(wish), wish.dtype) if asked is None else map(str.strip, asked)
        found = {wish.dtype if name.upper() in FLOAT_TYPES else codec(name, _ANY_COLUMNS).name for name in names}
        return tuple(sorted(found, key=lambda name: -codec(name, _ANY_COLUMNS).bits_per_weight))

    def can_hold(self, kind: str, shape: tuple[int, ...]) -> Yes | No:
        return Yes() if kind in FLOAT_TYPES else self.scheme.can_hold(kind, shape)

    def codec_of(self, tensor: Tensor, kind: str) -> str:
        return kind if kind in FLOAT_TYPES else self.scheme.codec_of(tensor, kind)

    def bytes_of(self, kind: str, shape: tuple[int, ...]) -> int:
        return nbytes(kind, shape) if kind in FLOAT_TYPES else self.scheme.bytes_of(kind, shape)

    def aligned(self, model: Model, size: int) -> int:
        return size

    def fixed(self, model: Model) -> dict[str, MixTensor]:
        linear = {tensor.name for tensor in model.tensors if is_linear(tensor)}
        return {t.name: t for t in self.mix(model, ()).tensors if t.name not in linear}

    def together(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        return stacks(names)

    def header_bytes(
        self, model: Model, store: EvidenceStore | None, solver: str, transforms: Mapping[str, Any]
    ) -> int:
        """Of all headers, whatever types a plan chooses, and of what stands beside: no less, and little more."""
        dtype, kinds = self.wish().dtype, self.types(model, None)
        longest = 2 * len(str(nbytes(dtype, (model.parameters,))))  # digits of a place in the file
        family, entries = written(model)
        described = sum(self._described(entry, dtype, kinds, longest) for entry in entries)
        documents = json.dumps(checkpoint_config(model, family, dtype), indent=2, ensure_ascii=False)
        recipe = recipe_json(model, self.options, self.mix(model, ()), store, solver, transforms)
        documents += json.dumps(json.loads(recipe), indent=6)
        # Every tensor may be listed in the index, among the scheme's modules, and with its error.
        listed = sum(len(entry.name) + len(entry.tensor) + len(entry.module) + _LISTED for entry in entries)
        return _AROUND + described + len(documents.encode()) + listed + _beside(model)

    def file_bytes(self, model: Model, mix: Mix, store: EvidenceStore | None, solver: str, measured: bool) -> int:
        return mix.tensor_bytes + self.header_bytes(model, store, solver, {})

    def _described(self, entry: Written, dtype: str, kinds: Sequence[str], longest: int) -> int:
        """The most that one tensor of a checkpoint takes in a header."""
        packed = [kind for kind in kinds if kind not in FLOAT_TYPES] if len(entry.shape) == 2 else []
        held = [kind for kind in packed if not isinstance(self.can_hold(kind, entry.shape), No)]
        forms = [stored_as(self.scheme, entry, kind, dtype) for kind in (dtype, *held)]
        return max(sum(len(lay_out([part], {})[0]) + longest for part in form.values()) for form in forms)


def _beside(model: Model) -> int:
    """Bytes of the tokenizer and of what else is taken over or made of the source."""
    if model.kind != "gguf":
        return bytes_of(copies(model))
    with TemporaryDirectory() as folder:
        made_files(model, Path(folder))
        return bytes_of(Path(folder).iterdir())
