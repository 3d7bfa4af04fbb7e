"""plan.toml: what is written is what is read, what was edited is honoured, what is hostile is refused."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from dither.containers.plan_file import PlanEntry, PlanFile, plan_sha256, read_plan, write_plan
from dither.containers.presets import quantized_types
from dither.errors import OutputError, UsageError

try:
    import tomllib
except ImportError:
    import tomli as tomllib

PLAN = PlanFile(
    model="tiny",
    model_identity="ab12",
    evidence="",
    solver="gptq",
    transforms=("awq", "rotate"),
    budget=100_000,
    tensor_bytes=98_304,
    bytes=99_000,
    kl=0.0123,
    tensors={
        "token_embd.weight": PlanEntry("Q6_K", 61_440, 2.5e-5),
        "blk.0.attn_q.weight": PlanEntry("Q4_K", 36_864, 1.2e-4),
        "blk.10.attn_q.weight": PlanEntry("IQ4_XS", 0, None),
    },
    notes=("a note", 'and "another"\nin two lines'),
)

SIZES = st.integers(0, 2**63 - 1)
KLS = st.none() | st.floats(0, 1e6)
TYPES = st.builds(PlanEntry, st.sampled_from(quantized_types()), SIZES, KLS)
TEXT = st.text() | st.text("\\\"'\n\r\t\x00\x1b\x7f\x85=#[]{}.\u2028é😀", max_size=12)
PLANS = st.builds(
    PlanFile,
    TEXT,
    TEXT,
    TEXT,
    TEXT,
    st.lists(TEXT, max_size=3).map(tuple),
    st.none() | SIZES,
    SIZES,
    KLS,
    st.dictionaries(TEXT, TYPES, max_size=6),
    st.lists(TEXT, max_size=3).map(tuple),
    st.just(""),
    st.none() | SIZES,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@given(plan=PLANS)
def test_what_is_written_is_read(folder: Path, plan: PlanFile) -> None:
    path = folder / "plan.toml"
    write_plan(path, plan, force=True)
    again = read_plan(path)
    assert again == plan
    assert list(again.tensors) == list(plan.tensors)
    assert tomllib.loads(path.read_text(encoding="utf-8"))["tensor_bytes"] == plan.tensor_bytes
    assert plan_sha256(again) == plan_sha256(plan)
    for (pattern, kind), (name, planned) in zip(plan.overrides(), plan.tensors.items(), strict=True):
        assert re.search(pattern, name) and kind == planned.type
        assert [other for other in plan.tensors if re.search(pattern, other)] == [name]


def test_it_reads_like_a_table(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    write_plan(path, PLAN)
    text = path.read_text()
    assert text.startswith("# A plan of Dither")
    assert text[text.index("[tensors]") :] == (
        "[tensors]\n"
        '"token_embd.weight"    = { type = "Q6_K",   bytes = 61440, kl = 2.5e-05 }\n'
        '"blk.0.attn_q.weight"  = { type = "Q4_K",   bytes = 36864, kl = 0.00012 }\n'
        '"blk.10.attn_q.weight" = { type = "IQ4_XS", bytes =     0 }\n'
    )
    assert list(tmp_path.iterdir()) == [path]


def test_overrides_are_exact() -> None:
    patterns = [pattern for pattern, _ in PLAN.overrides()]
    assert patterns[1] == r"\Ablk\.0\.attn_q\.weight\Z"
    assert not re.search(patterns[1], "blk.0.attn_q.weight\n")
    assert not re.search(patterns[1], "blk.0xattn_q.weight")


def test_the_hash_covers_what_decides_the_file() -> None:
    kept = dataclasses.replace(
        PLAN,
        tensors={name: PlanEntry(old.type, 1, 9.0) for name, old in reversed(PLAN.tensors.items())},
        notes=(),
        kl=None,
        budget=None,
        tensor_bytes=0,
        bytes=None,
        model="other",
    )
    assert plan_sha256(kept) == plan_sha256(PLAN)
    for change in (
        {"solver": "nearest"},
        {"transforms": ("rotate", "awq")},
        {"tensors": PLAN.tensors | {"token_embd.weight": PlanEntry("Q5_K", 61_440, 2.5e-5)}},
        {"tensors": {name: PLAN.tensors[name] for name in list(PLAN.tensors)[1:]}},
    ):
        assert plan_sha256(dataclasses.replace(PLAN, **change)) != plan_sha256(PLAN)


def edited(tmp_path: Path, old: str, new: str) -> Path:
    path = tmp_path / "plan.toml"
    write_plan(path, PLAN, force=True)
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    return path


def test_an_edited_type_is_taken_and_nothing_recomputed(tmp_path: Path) -> None:
    plan = read_plan(edited(tmp_path, '"Q4_K",  ', '"q8_0",'))
    assert plan.tensors["blk.0.attn_q.weight"] == PlanEntry("Q8_0", 36_864, 1.2e-4)
    assert plan.tensor_bytes == PLAN.tensor_bytes and plan_sha256(plan) != plan_sha256(PLAN)


def test_a_plan_of_the_first_format_is_read(tmp_path: Path) -> None:
    """Its `bytes` were the tensors', and its `budget` was of the file or of them, as had been asked for."""
    path = tmp_path / "plan.toml"
    path.write_text(
        'format = 1\nmodel = "tiny"\nmodel_identity = "ab"\nevidence = ""\nsolver = "gptq"\ntransforms = []\n'
        'budget = 100\nbytes = 98\nkl = 0.5\nnotes = []\n[tensors]\n"w" = { type = "Q4_K", bytes = 36864, kl = 0.1 }\n'
    )
    old = read_plan(path)
    assert (old.tensor_bytes, old.bytes, old.budget) == (98, None, None)
    assert old.tensors["w"] == PlanEntry("Q4_K", 36_864, 0.1)
    write_plan(tmp_path / "new.toml", old)
    again = read_plan(tmp_path / "new.toml")
    assert again == old and plan_sha256(again) == plan_sha256(old)


def test_comments_and_order_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    write_plan(path, PLAN)
    head, tensors = path.read_text().split("[tensors]\n")
    path.write_text(f"{head}[tensors] # mine\n" + "\n".join(reversed(tensors.splitlines())) + "  # end")
    assert plan_sha256(read_plan(path)) == plan_sha256(PLAN)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"Q4_K"', '"Q9_Z"', r'line \d+: "blk.0.attn_q.weight": type "Q9_Z" is not known. Choose one of F32'),
        ('"Q4_K"', '"\\u001b[2J"', r'type "\\u001b\[2J" is not known'),
        ('"Q4_K"', "4", "`type` must be a string"),
        ("36864", "-1", "`bytes` must be a whole number from 0"),
        ("36864", "true", "`bytes` must be a whole number"),
        ("36864", "9223372036854775808", "`bytes` must be a whole number from 0"),
        ("36864", "9" * 5000, "is no plan"),
        ("36864", "36864.0", "`bytes` must be a whole number"),
        ("0.00012", "nan", "`kl` must be a finite number"),
        ("0.00012", "inf", "`kl` must be a finite number"),
        ("0.00012", "-1e-9", "`kl` must be a finite number"),
        ("0.00012", "1979-05-27", "`kl` must be a number"),
        ("0.00012", "0.00012, size = 3", 'line .*has a key "size" that no plan has'),
        ('{ type = "Q4_K",   bytes = 36864, kl = 0.00012 }', "3", 'line .*"blk.0.attn_q.weight": is no table'),
        ("bytes = 36864, ", "", "has no `bytes`"),
        ("blk.0.attn_q", "token_embd", "is no plan"),  # the same key twice
        ("solver =", "sólver =", "is no plan"),
        ("solver =", "solvers =", 'has a key "solvers" that no plan has'),
        ('solver = "gptq"\n', "", "has no `solver`"),
        ('["awq", "rotate"]', '["awq", 1]', "`transforms` must be a list of strings"),
        ('["awq", "rotate"]', '"awq"', "`transforms` must be a list of strings"),
        ("budget = 100000", "budget = false", "`budget` must be a whole number"),
        ("format = 2", "format = 3", "has format 3, and this Dither reads 1 and 2"),
        ("format = 2", "", "has no `format`"),
        ("[tensors]", "[tensor]", "has a key"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_plan(edited(tmp_path, old, new))


def test_the_line_is_the_tensors(tmp_path: Path) -> None:
    path = edited(tmp_path, '"Q4_K"', '"Q9"')
    at = 1 + next(i for i, line in enumerate(path.read_text().splitlines()) if '"Q9"' in line)
    with pytest.raises(UsageError, match=rf"line {at}: "):
        read_plan(path)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe",
        b"\x00" * 100,
        b"[" * 100_000,
        b"a = " + b"[" * 100_000,
        b"a" * 5 * 2**20,
        b"#" * (4 * 2**20 + 1),
        b"format = 1\n" * 2,
        b"a = " + b"{b = " * 20_000,
        b"import os",
        b"GGUF\x03\0\0\0",
        b"a." * 2**20 + b"a=1",
        b"[" + b"a." * 2**20 + b"a]",
        b'x = """"a "b""", "c"\n',
        b"x = { y = 'a\"', " + b"a." * 2**20 + b"a = 1 }",
        b'"' + b'\\"' * 2**20,
        b"x = " + b"{ a = " * 2**18,
    ],
    ids=lambda value: repr(value)[:40],
)
def test_hostile_bytes_are_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(raw)
    with pytest.raises(UsageError):
        read_plan(path)


@given(raw=st.binary(max_size=200), at=st.integers(0, 900))
def test_damaged_plans_are_read_or_refused(folder: Path, raw: bytes, at: int) -> None:
    path = folder / "damaged.toml"
    write_plan(path, PLAN, force=True)
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + raw + whole[at + len(raw) :])
    try:
        assert isinstance(read_plan(path), PlanFile)
    except UsageError as error:
        assert "\x1b" not in str(error)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "missing.toml", tmp_path / "pipe"):
        with pytest.raises(UsageError, match="is no file"):
            read_plan(path)


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    write_plan(path, PLAN)
    other = dataclasses.replace(PLAN, solver="nearest")
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        write_plan(path, other)
    assert read_plan(path) == PLAN
    write_plan(path, other, force=True)
    assert read_plan(path) == other
    with pytest.raises(OutputError, match="cannot be written"):
        write_plan(tmp_path / "no" / "plan.toml", PLAN)
    (tmp_path / "link.toml").symlink_to(path)
    with pytest.raises(OutputError, match="no regular file"):
        write_plan(tmp_path / "link.toml", PLAN, force=True)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "\ud800"},
        {"kl": float("nan")},
        {"bytes": -1},
        {"budget": 2**63},
        {"tensors": {"t": PlanEntry("Q9", 1, None)}},
        {"notes": ("x" * 5 * 2**20,)},
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_plan_that_could_not_be_read_is_not_written(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        write_plan(tmp_path / "plan.toml", dataclasses.replace(PLAN, **change))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.toml"
    write_plan(path, PLAN)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_plan(path, dataclasses.replace(PLAN, solver="nearest"), force=True)
    assert read_plan(path) == PLAN and list(tmp_path.iterdir()) == [path]
