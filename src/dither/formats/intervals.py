"""Figures with the ends of their interval, and records that keep them flat on disk.

In Python a figure is one `Interval`: a float, so that it computes, compares and formats as the number it is, with
its ends beside it.  In a file and in `--json` it is three fields, `kl_mean`, `kl_mean_low` and `kl_mean_high`,
because that is what charts and CI jobs read most easily.  `IntervalRecord` turns one form into the other.

A figure from one sample has no interval: both ends are None then, and null in a file.  The figure itself twice
would say that it is certain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, model_serializer, model_validator
from pydantic_core import core_schema

from dither.display import interval

if TYPE_CHECKING:
    from typing_extensions import Self


class Interval(float):
    """A figure, and the ends of the interval around it: both, or neither."""

    LEAST: ClassVar[float | None] = None  # none of the three may be below it
    ALWAYS: ClassVar[bool] = False  # whether its ends are there in any case
    low: float | None
    high: float | None

    def __new__(cls, value: float, low: float | None = None, high: float | None = None) -> Self:
        if (low is None) != (high is None):
            raise ValueError("an interval has two ends, or none")
        found = super().__new__(cls, value)
        found.low, found.high = low, high
        return found

    @property
    def value(self) -> float:
        return float(self)

    @property
    def ends(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}

    @property
    def both(self) -> tuple[float, float] | None:
        """The two ends, where there is an interval."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def with_ends(self, form: str = ".3g") -> str:
        """
        >>> Interval(0.0312, 0.03, 0.0323).with_ends(), Interval(0.9, 0.88, 0.92).with_ends(".0%")
        ('0.0312 (95 %: 0.03 to 0.0323)', '90% (95 %: 88% to 92%)')
        >>> Interval(0.0312).with_ends()
        '0.0312'
        """
        return interval(self, self.low, self.high, form)

    def __eq__(self, other: object) -> bool:  # of two intervals, the ends too
        return self.ends == other.ends if isinstance(other, Interval) else self.value == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = float.__hash__

    def __reduce__(self) -> tuple[type[Interval], tuple[float | None, ...]]:  # copied and pickled whole
        return type(self), tuple(self.ends.values())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        number = core_schema.float_schema(allow_inf_nan=False, ge=cls.LEAST)
        end = core_schema.typed_dict_field(number if cls.ALWAYS else core_schema.nullable_schema(number))
        three = core_schema.typed_dict_schema({"value": core_schema.typed_dict_field(number), "low": end, "high": end})
        flat = core_schema.plain_serializer_function_ser_schema(float)
        return core_schema.no_info_after_validator_function(lambda ends: cls(**ends), three, serialization=flat)


class IntervalRecord(BaseModel):
    """A frozen record, flat where it is written; `x_low` and `x_high` can be asked of it as well as `x.low`."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="ignore")
    _intervals: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for name, field in cls.model_fields.items():
            kinds = (field.annotation, *get_args(field.annotation))
            if any(isinstance(kind, type) and issubclass(kind, Interval) for kind in kinds):
                cls._intervals = (*cls._intervals, name)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, given: dict[str, Any]) -> dict[str, Any]:
        found = dict(given)
        for name in cls._intervals:
            figure = given.get(name)
            if isinstance(figure, Interval):
                found[name] = figure.ends
            elif figure is not None:
                ends = {end: given[f"{name}_{end}"] for end in ("low", "high") if f"{name}_{end}" in given}
                found[name] = {"value": figure, **ends}
        return found

    @model_serializer(mode="wrap")
    def _flatten(self, fields: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in fields(self).items():
            flat[name] = value
            if name in self._intervals:
                figure = getattr(self, name)
                flat |= {f"{name}_{end}": getattr(figure, end, None) for end in ("low", "high")}
        return flat

    if not TYPE_CHECKING:  # in this package `x.low` is written, which can be checked

        def __getattr__(self, name: str) -> Any:
            figure, _, end = name.rpartition("_")
            if end in ("low", "high") and figure in self._intervals:
                return getattr(getattr(self, figure), end, None)
            return super().__getattr__(name)
