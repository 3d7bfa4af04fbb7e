"""The results document: everything the page, the exported report and the model card show, in one object.

One JSON object with a schema's name and a version; the live page fetches it, the exported page carries it.
A document may come from a stranger: every text is bounded, every number finite, every list limited, and what
breaks a rule is refused with the name of its field.  Fields that are not known are passed over, so that a
newer minor writer can be read; a higher `version` cannot.

Units: bytes, nats per token, bits per weight, seconds.  A number's `tag` says where it is from: *measured*,
*estimated* (by a formula), *literature* (published by others), *told* (by the person).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from dither.errors import FormatError, UnsupportedError
from dither.formats.sidecars import first_fault
from dither.reporting.answer_records import Answer, Forced
from dither.reporting.private_paths import placeless
from dither.system.files import read_bytes
from dither.system.json_text import parse_object

SCHEMA = "dither.results"
VERSION = 2  # 1 had the tensors' bytes under `bytes`, and the file's as `file_bytes`
LARGEST = 256 * 2**20  # bytes of a document; a report of eight files with tiles has about a megabyte
MOST_RUNS, MOST_TENSORS = 1024, 65536
_AGAIN = "Write it again with `dither report`."

Name = Annotated[str, Field(max_length=512)]  # of files, types, tensors
Text = Annotated[str, Field(max_length=8192)]  # sentences and commands
Long = Annotated[str, Field(max_length=2**20)]  # what models write; base64 of a tile
Count = Annotated[int, Field(ge=0, le=2**60)]
Number = Annotated[float, Field(ge=-1e30, le=1e30)]  # what charts can still draw
Share = Annotated[float, Field(ge=0)]
Tag = Literal["measured", "estimated", "literature", "told"]


class DocumentPart(BaseModel):
    """What all parts of the document share."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="ignore", populate_by_name=True)


class Value(DocumentPart):
    """A number and the ends of its 95 % interval."""

    value: Number
    low: Number | None = None
    high: Number | None = None


class TaggedValue(Value):
    tag: Tag = "measured"


class Reference(DocumentPart):
    """The original that the runs were made of."""

    name: Name
    architecture: Name
    parameters: Count
    bytes: Count
    bits_per_weight: Share
    path: Text | None = None
    license: Name = ""


class TensorRow(DocumentPart):
    """One tensor of a file: a cell of the heat map.  `kl_alone`: the divergence if only it were quantized."""

    name: Name
    layer: int | None = None
    kind: Name  # "attn_q", "token_embd"
    type: Name
    bpw: Share
    bytes: Count
    shape: Annotated[tuple[Count, ...], Field(max_length=8)]
    relative_error: Share | None = None  # √(Σ(w − ŵ)² / Σw²)
    error_tag: Tag | None = None
    kl_alone: float | None = None
    kl_tag: Tag | None = None


class MeasuredOn(DocumentPart):
    """The text a run's metrics come from: its name, how many positions were scored, the longest sequence."""

    data: Name
    tokens: Count
    context: Count
    sha256: Name = ""  # of the token ids


class TileRecord(DocumentPart):
    """A square of a tensor, original and quantized: float16 numbers, row by row, as base64."""

    rows: Annotated[int, Field(ge=1, le=1024)]
    columns: Annotated[int, Field(ge=1, le=1024)]
    row: Count
    column: Count
    original: Long
    quantized: Annotated[dict[Name, Long], Field(max_length=64)]
    clip: Share
    block: Count
    type: Name
    outlier_columns: Annotated[tuple[Count, ...], Field(max_length=4096)] = ()
    tensor: Name = ""
    shape: Annotated[tuple[Count, ...], Field(max_length=8)] = ()
    notes: Annotated[tuple[Text, ...], Field(max_length=64)] = ()


class PaletteRecord(DocumentPart):
    """The numbers that one block may take and does take, and the same block through other grids."""

    type: Name
    block: Count
    levels: Annotated[tuple[float, ...], Field(max_length=65536)]
    used: Annotated[tuple[Count, ...], Field(max_length=65536)]
    values: Annotated[tuple[float, ...], Field(max_length=65536)]
    uniform: Annotated[tuple[float, ...], Field(max_length=65536)] = ()
    iq4_nl: Annotated[tuple[float, ...], Field(max_length=65536)] = ()
    nf4: Annotated[tuple[float, ...], Field(max_length=65536)] = ()
    tensor: Name = ""
    row: Count = 0
    rows: Count = 0
    index: Count = 0
    blocks: Count = 0
    how: Text = ""
    notes: Annotated[tuple[Text, ...], Field(max_length=64)] = ()


class SpeedRecord(DocumentPart):
    """A file timed on one machine; tokens per second, joules per token."""

    run: Name
    command: Text
    threads: Count
    prefill: Value | None = None
    decode: Value | None = None
    peak_memory_bytes: Count | None = None
    joules_per_token: Value | None = None
    joules_note: Text = ""
    machine: Text = ""
    tag: Tag = "measured"


class RunRecord(DocumentPart):
    """A quantized file, and what is known of it."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")]
    file: Name
    path: Text | None = None  # none in exports
    type: Name
    container: Name
    recipe: Text = ""
    command: Text | None = None
    measure_command: Text | None = None
    reference: Name | None = None  # what it was measured against
    bytes: Count  # of the file, or of a folder's weights, configuration and tokenizer together
    tensor_bytes: Count
    parameters: Count
    bpw: Share
    mixed: Annotated[tuple[tuple[Name, Count, Count], ...], Field(max_length=256)] = ()
    metrics: Annotated[dict[Name, TaggedValue], Field(max_length=64)] = {}
    measured_on: MeasuredOn | None = None
    label: Name = ""  # its type, or more where types repeat
    family: Name = ""  # its container and how the numbers were chosen, which charts tell apart
    comparable: bool = True  # measured on the same text as most others, and not stale
    stale: bool = False  # the metrics are of an earlier file of this name
    drift: Annotated[tuple[float, ...], Field(max_length=8192)] = ()
    notes: Annotated[tuple[Text, ...], Field(max_length=1024)] = ()
    tensors: Annotated[tuple[TensorRow, ...], Field(max_length=MOST_TENSORS)] = ()
    tiles: Annotated[dict[Name, TileRecord], Field(max_length=256)] = {}
    palettes: Annotated[dict[Name, PaletteRecord], Field(max_length=256)] = {}
    timed: SpeedRecord | None = Field(default=None, exclude=True)  # what the document's `speed` is made of
    answers: Annotated[tuple[Answer, ...], Field(max_length=1024)] = ()
    forced: Annotated[tuple[Forced, ...], Field(max_length=1024)] = ()

    @model_validator(mode="before")
    @classmethod
    def _of_before(cls, run: Any) -> Any:
        """A run as the first version has it."""
        if not isinstance(run, dict) or "tensor_bytes" in run:
            return run
        of_file = run.get("file_bytes")
        kept = {key: value for key, value in run.items() if key != "file_bytes"}
        return {**kept, "tensor_bytes": run.get("bytes"), "bytes": run.get("bytes") if of_file is None else of_file}

    def metric(self, key: str) -> float | None:
        """The number, None where it is not known."""
        return self.metrics[key].value if key in self.metrics else None


class WeightsQuality(DocumentPart):
    kl: float
    tag: Tag
    source: Text = ""


class Weights(DocumentPart):
    """One way to store the weights: a file's (`run`), or a type that could be made.

    Of its bytes, `active` are read for every token, and `embedding` are those of a token embedding that is no
    output matrix, which no GPU holds.
    """

    type: Name
    run: Name | None = None
    file: bool = False
    bytes: Count
    active: Count
    embedding: Count
    bpw: Share
    needs_importance: bool = False
    quality: WeightsQuality | None = None
    notes: Annotated[tuple[Text, ...], Field(max_length=1024)] = ()


class FitInput(DocumentPart):
    """What the page's memory arithmetic needs (`capacity.fit`): the machine, the model's shape, constants."""

    machine: dict[str, JsonValue]
    model: Text
    architecture: Name
    parameters: Count
    shape: dict[str, JsonValue]
    weights: Annotated[tuple[Weights, ...], Field(max_length=2048)]
    defaults: dict[str, JsonValue]
    constants: dict[str, JsonValue]
    notes: Annotated[tuple[Text, ...], Field(max_length=1024)] = ()


class FrontierPoint(DocumentPart):
    """A run where the chart draws it: `x` in units of the size axis, the others as its metric's axis shows them."""

    id: Name  # of the run
    family: Name
    x: Number
    y: Number
    low: Number | None = None
    high: Number | None = None
    pareto: bool = False  # nothing as small is better


Places = Annotated[tuple[Annotated[int, Field(ge=0, le=63)] | None, ...], Field(max_length=MOST_RUNS)]


class LabelLayout(DocumentPart):
    """Where labels go in a view at least `view` pixels wide, whose plot is `height` high.

    `places` are indices of the frontier's `sides`, one a point; a chosen run that has none there may have a
    layout of its own, `chosen[run]`.
    """

    view: Count
    height: Count
    places: Places
    chosen: Annotated[dict[Name, Places], Field(max_length=64)] = {}


class FrontierMetric(DocumentPart):
    """One of the axes that a person may choose; without points where no run has the metric."""

    name: Name
    title: Name
    less: bool  # is better
    scale: Literal["log", "linear"]
    factor: Number  # that its values are shown with
    points: Annotated[tuple[FrontierPoint, ...], Field(max_length=MOST_RUNS)] = ()
    x_domain: tuple[Number, Number] | None = None
    y_domain: tuple[Number, Number] | None = None
    y_ticks: Annotated[tuple[Number, ...], Field(max_length=256)] | None = None
    layouts: Annotated[tuple[LabelLayout, ...], Field(max_length=64)] = ()


class Frontier(DocumentPart):
    """Size against each metric, as the page draws it; which run is best under a budget follows from `pareto`."""

    unit: Name  # of the size axis
    unit_bytes: Annotated[int, Field(ge=1, le=2**60)]
    sides: Annotated[tuple[tuple[int, int, Literal["left", "right", "center"]], ...], Field(max_length=64)]
    metrics: Annotated[dict[Name, FrontierMetric], Field(max_length=64)]


class Problem(DocumentPart):
    """A file that was refused, and why."""

    file: Text
    reason: Text


class Document(DocumentPart):
    """All of it."""

    schema_name: Literal["dither.results"] = Field(default="dither.results", alias="schema")
    version: Annotated[int, Field(ge=1, le=VERSION)] = VERSION
    tool: Name
    made: Name  # ISO 8601, UTC
    live: bool
    title: Name
    reference: Reference | None = None
    runs: Annotated[tuple[RunRecord, ...], Field(max_length=MOST_RUNS)] = ()
    frontier: Frontier | None = None
    fit: FitInput | None = None
    speed: Annotated[tuple[SpeedRecord, ...], Field(max_length=4096)] = ()
    picture: JsonValue = None
    guide: JsonValue = None
    glossary: JsonValue = None
    problems: Annotated[tuple[Problem, ...], Field(max_length=4096)] = ()

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)

    def exported(self) -> Document:
        """As it leaves this machine: nothing of where files lie."""
        places = [run.path for run in self.runs] + [self.reference.path if self.reference else None]
        cut = partial(placeless, folders={str(Path(place).parent) for place in places if place})
        return self.model_copy(
            update={
                "runs": tuple(_exported_run(run, cut) for run in self.runs),
                "reference": self.reference and self.reference.model_copy(update={"path": None}),
                "problems": tuple(_cut(known, cut, "reason", file=Path(known.file).name) for known in self.problems),
                "fit": self.fit and _exported_fit(self.fit, cut),
                "live": False,
                "speed": tuple(_cut(timed, cut, "command") for timed in self.speed),
            }
        )


Cut = Callable[[str], str]
_Part = TypeVar("_Part", bound=DocumentPart)


def _cut(part: _Part, cut: Cut, *names: str, **changes: object) -> _Part:
    """`part` with `cut` put on its texts and lists of texts of these names, where it has any, and with `changes`."""
    texts = {name: text for name in names if (text := getattr(part, name))}
    done = {name: cut(text) if isinstance(text, str) else tuple(map(cut, text)) for name, text in texts.items()}
    return part.model_copy(update={**done, **changes})


def _exported_run(run: RunRecord, cut: Cut) -> RunRecord:
    on = run.measured_on and _cut(run.measured_on, cut, "data")
    return _cut(run, cut, "command", "measure_command", "reference", "notes", path=None, measured_on=on)


def _exported_fit(fit: FitInput, cut: Cut) -> FitInput:
    weights = tuple(
        _cut(entry, cut, "notes", quality=entry.quality and _cut(entry.quality, cut, "source")) for entry in fit.weights
    )
    return _cut(fit, cut, "notes", model=Path(fit.model).name, weights=weights)


def now() -> str:
    """This moment as documents write it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")


def load(path: str | Path) -> Document:
    """Reads and checks a document.

    Raises SourceError where there is none, FormatError where it is something else, UnsupportedError where a newer
    version wrote it.
    """
    return parse(read_bytes(Path(path), LARGEST, _AGAIN), str(path))


def parse(text: str | bytes, thing: str) -> Document:
    """A document from its JSON; `thing` names it in errors.  Raises as `load` does."""
    found = parse_object(text, thing, _AGAIN)
    if found.get("schema") != SCHEMA:
        raise FormatError(thing, f"is not a results document: its schema is not {SCHEMA}", _AGAIN)
    version = found.get("version")
    if type(version) is not int or version < 1:
        raise FormatError(thing, "is not a results document: it has no version", _AGAIN)
    if version > VERSION:
        reason = f"was written by a newer Dither (version {version}; this one reads up to {VERSION})"
        raise UnsupportedError(thing, reason, "Upgrade with: pip install -U dither")
    try:
        return Document.model_validate_json(text)
    except ValidationError as error:
        raise FormatError(thing, first_fault(error), _AGAIN) from None
