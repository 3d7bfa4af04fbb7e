"""Numbers with the ends of their interval, and records that write them flat.

In Python one figure is one `Interval`: a float, so that it formats, compares and computes as the number it is,
with its ends beside it.  On disk and in `--json` it is three fields,

    kl_mean, kl_mean_low, kl_mean_high

because a chart or a CI job reads a flat object most easily.  `IntervalRecord` goes from one form to the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import core_schema

from dither.display import interval


class Interval(float):
    """A figure, and the ends of the interval around it."""

    __slots__ = ("high", "low")
    LEAST: ClassVar[float | None] = None  # what none of the three may be below
    low: float
    high: float

    def __new__(cls, value: float, low: float, high: float) -> Interval:
        found = super().__new__(cls, value)
        found.low, found.high = low, high
        return found

    def __eq__(self, other: object) -> bool:  # of two intervals, the ends too
        if isinstance(other, Interval):
            return (self.value, self.low, self.high) == (other.value, other.low, other.high)
        return self.value == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = float.__hash__

    def __reduce__(self) -> tuple[type[Interval], tuple[float, float, float]]:  # copied and pickled whole
        return type(self), (self.value, self.low, self.high)

    @property
    def value(self) -> float:
        return float(self)

    def with_ends(self, form: str = ".3g") -> str:
        """
        >>> Interval(0.0312, 0.03, 0.0323).with_ends(), Interval(0.9, 0.88, 0.92).with_ends(".0%")
        ('0.0312 (95 %: 0.03 to 0.0323)', '90% (95 %: 88% to 92%)')
        """
        return interval(self, self.low, self.high, form)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        number = core_schema.typed_dict_field(core_schema.float_schema(allow_inf_nan=False, ge=cls.LEAST))
        ends = core_schema.typed_dict_schema(dict.fromkeys(("value", "low", "high"), number))
        return core_schema.no_info_after_validator_function(
            lambda found: cls(**found), ends, serialization=core_schema.plain_serializer_function_ser_schema(float)
        )


class IntervalRecord(BaseModel):
    """A frozen record, read from and written to a flat object.

    What was read as `x_low` and `x_high` can still be asked by these names.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="ignore")
    _intervals: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        kinds = {name: (field.annotation, *get_args(field.annotation)) for name, field in cls.model_fields.items()}
        cls._intervals = tuple(
            name
            for name, of in kinds.items()
            if any(isinstance(kind, type) and issubclass(kind, Interval) for kind in of)
        )

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        gathered = {}
        for name in cls._intervals:
            whole = given.get(name)
            if isinstance(whole, Interval):
                gathered[name] = {"value": whole.value, "low": whole.low, "high": whole.high}
            elif whole is not None:
                ends = {end: given[f"{name}_{end}"] for end in ("low", "high") if f"{name}_{end}" in given}
                gathered[name] = {"value": whole, **ends}
        return {**given, **gathered}

    @model_serializer(mode="wrap")
    def _flat(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in handler(self).items():
            flat[name] = value
            if name in self._intervals:
                whole = getattr(self, name)
                flat[f"{name}_low"], flat[f"{name}_high"] = (None, None) if whole is None else (whole.low, whole.high)
        return flat

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            whole, _, end = name.rpartition("_")
            if end in ("low", "high") and whole in self._intervals:
                found = getattr(self, whole)
                return None if found is None else getattr(found, end)
            return super().__getattr__(name)
