"""An interval is its number, keeps its ends wherever it goes, and is three fields on disk."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from pydantic import ValidationError

from dither.formats.intervals import Interval, IntervalRecord


class Rate(Interval):
    LEAST = 0.0


class Record(IntervalRecord):
    name: str
    kl: Interval
    rate: Rate | None = None
    notes: tuple[str, ...] = ()


FLAT = {"name": "a", "kl": 0.2, "kl_low": 0.1, "kl_high": 0.4, "rate": None, "rate_low": None, "rate_high": None}


def test_it_is_a_number_with_ends() -> None:
    found = Interval(0.2, 0.1, 0.4)
    assert found == 0.2 and found + 1 == 1.2 and f"{found:.2f}" == "0.20" and json.dumps(found) == "0.2"
    assert found == Interval(0.2, 0.1, 0.4)
    assert found != Interval(0.2, 0.1, 0.5) and len({found, Interval(0.2, 0.1, 0.4)}) == 1
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert other == found and type(other) is Interval


def test_a_record_is_flat_on_disk_and_in_the_order_of_its_fields() -> None:
    record = Record(name="a", kl=Interval(0.2, 0.1, 0.4))
    assert list(record.model_dump().items()) == [*FLAT.items(), ("notes", ())]
    text = record.model_dump_json()
    assert list(json.loads(text).items()) == [*FLAT.items(), ("notes", [])]
    assert Record.model_validate_json(text) == record == Record.model_validate(FLAT)


def test_the_flat_names_can_be_asked() -> None:
    record = Record.model_validate({**FLAT, "rate": 3, "rate_low": 2, "rate_high": 5})
    assert (record.kl_low, record.kl_high, record.rate_low, record.rate_high) == (0.1, 0.4, 2.0, 5.0)
    assert Record.model_validate(FLAT).rate_low is None
    with pytest.raises(AttributeError, match="name_low"):
        _ = record.name_low


@pytest.mark.parametrize(
    "changed",
    [
        {"kl": None},
        {"kl_low": "low"},
        {"kl_high": float("nan")},
        {"kl_high": None},
        {"rate": 1.0, "rate_low": -1.0, "rate_high": 2.0},
        {"rate": 1.0, "rate_low": 1.0, "rate_high": float("inf")},
    ],
)
def test_what_is_no_interval_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Record.model_validate({**FLAT, **changed})


def test_a_figure_without_an_interval_has_neither_end() -> None:
    record = Record.model_validate({**FLAT, "kl_low": None, "kl_high": None})
    assert (record.kl, record.kl.low, record.kl.high, record.kl.both) == (0.2, None, None, None)
    assert json.loads(record.model_dump_json()) == {**FLAT, "kl_low": None, "kl_high": None, "notes": []}
    assert Record.model_validate_json(record.model_dump_json()) == record
    assert pickle.loads(pickle.dumps(record.kl)) == record.kl
    with pytest.raises(ValueError, match="two ends, or none"):
        Interval(0.2, 0.1)


def test_an_end_that_is_missing_is_named() -> None:
    with pytest.raises(ValidationError, match=r"kl\.high\s+Field required"):
        Record.model_validate({"name": "a", "kl": 0.2, "kl_low": 0.1})
