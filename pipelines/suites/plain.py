"""Frozen records to plain JSON data and back: NaN becomes null, and fields of later versions are ignored.

A class with a shape of its own in JSON has `to_json` and `from_json`; all others are objects with their fields' names.
"""

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Return a record, or records in lists and mappings, as plain data; numbers that are not finite become None."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        return fields_of(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fields_of(record: Any) -> dict[str, Any]:
    """Return a record's fields as plain data."""
    return {field.name: to_plain(getattr(record, field.name)) for field in dataclasses.fields(record)}


def from_plain(kind: type[T], data: Any) -> T:
    """Return the record that plain data describes.

    Args:
        kind: A frozen dataclass whose fields are str, bool, int, float, records, and tuples, mappings and optional ones
            of these.
        data: What `to_plain` made of one, perhaps in a later version.

    Raises:
        ValueError: A field is missing, or has the wrong shape.
    """
    return cast(T, _value(kind, data, kind.__name__))


def fields_from(kind: type[T], data: Mapping[str, Any]) -> T:
    """Return the record whose fields `fields_of` wrote; for the `from_json` of a class, as `from_plain` calls that.

    Raises:
        ValueError: A field is missing, or has the wrong shape.
    """
    return cast(T, _record(kind, data, kind.__name__))


def _value(kind: Any, data: Any, place: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (each for each in arguments if each is not type(None))
        return None if data is None else _value(inner, data, place)
    if hasattr(kind, "from_json"):
        return kind.from_json(_checked(data, Mapping, place))
    if dataclasses.is_dataclass(kind):
        return _record(kind, _checked(data, Mapping, place), place)
    if origin is tuple:
        return tuple(_value(arguments[0], each, f"{place}[]") for each in _checked(data, list, place))
    if origin is not None:
        found = _checked(data, Mapping, place)
        return {key: _value(arguments[1], each, f"{place}.{key}") for key, each in found.items()}
    if kind is float:
        return float(_checked(data, (int, float), place))
    return _checked(data, kind, place)


def _record(kind: Any, data: Mapping[str, Any], place: str) -> Any:
    hints, given = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if field.name in data:
            given[field.name] = _value(hints[field.name], data[field.name], f"{place}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{place}: the field {field.name} is missing.")
    return kind(**given)


def _checked(data: Any, kind: Any, place: str) -> Any:
    if not isinstance(data, kind):
        names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{place}: {type(data).__name__} instead of {names}.")
    return data
