"""Dataclasses made from plain values, as YAML holds them: keys and types are checked by the annotations."""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lynx.train.renamed import RECIPE_KEYS

_Kind = TypeVar("_Kind")
_NAMES = {
    dict: "a mapping",
    list: "a list",
    NoneType: "null",
    str: "text",
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
}


class RecipeError(ValueError):
    """A recipe cannot be used; the message says where and why."""


def from_values(kind: type[_Kind], values: Mapping[str, Any], where: str, *, as_they_are: Iterable[str] = ()) -> _Kind:
    """A dataclass of these values.

    Args:
        kind: the dataclass.
        values: of its fields.
        where: what an error's message begins with.
        as_they_are: the fields whose values are not checked.

    Raises:
        RecipeError: a key is unknown, a value has another type than the field's annotation, or one is missing.
    """
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise unknown_key(key, known, where)
    hints = get_type_hints(kind)
    typed = {}
    for key, value in values.items():
        try:
            typed[key] = value if key in as_they_are else _typed(value, hints[key])
        except (TypeError, ValueError, OverflowError):
            raise RecipeError(f"{where}{key} is {value!r}, expected {_described(hints[key])}") from None
    required = {name for name, each in known.items() if each.default is MISSING and each.default_factory is MISSING}
    if missing := sorted(required - typed.keys()):
        raise RecipeError(f"{where}{', '.join(missing)} must be given")
    return kind(**typed)


def unknown_key(key: str, known: Iterable[str], where: str) -> RecipeError:
    """The error for a key that is not known: it tells the new name of an old key, else keys that look like it."""
    name = key.rpartition(".")[2]
    if name in RECIPE_KEYS:
        return RecipeError(f"{where}{name} is now called {RECIPE_KEYS[name]}")
    return RecipeError(f"{where}there is no key {key!r}{suggestion(key, known)}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of an error's message: which of the known names may have been meant, if any looks like it."""
    near = dict.fromkeys(difflib.get_close_matches(name, list(known)))
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _typed(value: Any, hint: Any) -> Any:
    """``value`` as the annotated type; else ValueError, TypeError or, for an integer no float holds, OverflowError."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        for each in get_args(hint):
            try:
                return _typed(value, each)
            except (TypeError, ValueError, OverflowError):
                continue
    elif origin is Literal:
        if value in get_args(hint):
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_typed(each, get_args(hint)[0]) for each in value)
    elif origin in (dict, list):
        if isinstance(value, origin):
            return value
    elif hint is NoneType:
        if value is None:
            return None
    elif hint is float:  # YAML reads 1e-4, without a dot, as text
        if not isinstance(value, bool) and math.isfinite(number := float(value)):
            return number
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError


def _described(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return " or ".join(_described(each) for each in get_args(hint))
    if origin is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if origin is tuple:
        return f"a list of {_described(get_args(hint)[0])}"
    return _NAMES[origin or hint]
