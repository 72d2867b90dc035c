"""Pipelines as strings: ``"fuse-gelu,skip-layers{layers=[3,7]},merge-tokens{r=13}"``.

A pass is its name, with options in braces; option values are Python literals (read with ``ast.literal_eval``).
``format_pipeline(parse_pipeline(text))`` parses to equal passes.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from planish.ir.errors import InputError, PlanishError, did_you_mean
from planish.passes import registry
from planish.passes.base import Pass

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_OPTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPEN, _CLOSE = "([{", ")]}"


def parse_pipeline(text: str, lookup: Any = registry) -> list[Pass]:
    """Reads a pipeline string; an empty one has no passes.

    Args:
        text: the string.
        lookup: has ``names()`` and ``get(name)``: passes other than the registered ones.

    Raises:
        InputError: with the string and a caret under the place that is wrong: syntax, an unknown pass or option
            (with a did-you-mean), a value that is no literal or not of the option's type.
    """
    if not isinstance(text, str):
        raise InputError(f"a pipeline is a string such as 'fuse-gelu,fold-constants', not {type(text).__name__}.")
    return _Parser(text, lookup).pipeline()


def format_pipeline(passes: Sequence[Pass]) -> str:
    """The pipeline string of some passes; options that have their default are left out."""
    return ",".join(str(p) for p in passes)


def as_passes(passes: str | Sequence[Pass | str]) -> list[Pass]:
    """Passes from a pipeline string, or from a list of passes and strings.

    Raises:
        InputError: an element is neither.
    """
    if isinstance(passes, str):
        return parse_pipeline(passes)
    if not isinstance(passes, Iterable):
        raise InputError(f"passes is a {type(passes).__name__}; give a pipeline string, or a list of passes.")
    found: list[Pass] = []
    for item in passes:
        if isinstance(item, str):
            found += parse_pipeline(item)
        elif isinstance(item, Pass):
            found.append(item)
        elif isinstance(item, type) and issubclass(item, Pass):
            raise InputError(f"passes holds the class {item.__name__}; give an instance: {item.__name__}().")
        else:
            raise InputError(f"passes holds an object of class {type(item).__name__}; give passes or their names.")
    return found


class _Parser:
    def __init__(self, text: str, lookup: Any = registry) -> None:
        self.text, self.at, self.lookup = text, 0, lookup

    def fail(self, problem: str, at: int | None = None) -> InputError:
        place = self.at if at is None else at
        # Tabs and line breaks would move the caret away from its place.
        shown = re.sub(r"\s", " ", self.text)
        return InputError(f"pipeline: {problem}\n  {shown}\n  {' ' * place}^")

    def spaces(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def peek(self) -> str:
        self.spaces()
        return self.text[self.at] if self.at < len(self.text) else ""

    def pipeline(self) -> list[Pass]:
        passes: list[Pass] = []
        if not self.peek():
            return passes
        while True:
            passes.append(self.one())
            mark = self.peek()
            if not mark:
                return passes
            if mark != ",":
                raise self.fail(f"expected ',' or the end, found '{mark}'.")
            self.at += 1

    def word(self, pattern: re.Pattern[str], what: str) -> tuple[str, int]:
        self.spaces()
        match = pattern.match(self.text, self.at)
        if match is None:
            found = f"'{self.text[self.at]}'" if self.at < len(self.text) else "the end"
            raise self.fail(f"expected {what}, found {found}.")
        start, self.at = self.at, match.end()
        return match[0], start

    def one(self) -> Pass:
        name, start = self.word(_NAME, "the name of a pass")
        if name not in self.lookup.names():
            raise self.fail(f"unknown pass '{name}'.{did_you_mean(name, self.lookup.names())}", start)
        cls = self.lookup.get(name)
        options: dict[str, Any] = {}
        places: dict[str, int] = {}
        if self.peek() == "{":
            self.at += 1
            while self.peek() != "}":
                option, value, place = self.option(cls)
                if option in options:
                    raise self.fail(f"option '{option}' of pass '{name}' is given twice.", place)
                options[option], places[option] = value, place
                if self.peek() == ",":
                    self.at += 1
                elif self.peek() != "}":
                    raise self.fail(f"expected ',' or '}}' in the options of '{name}', found {self.found()}.")
            self.at += 1
        return self.build(cls, options, start)

    def found(self) -> str:
        return f"'{self.peek()}'" if self.peek() else "the end"

    def option(self, cls: type[Pass]) -> tuple[str, Any, int]:
        option, start = self.word(_OPTION, f"an option of '{cls.name}' or '}}'")
        known = option_types(cls)
        if option not in known:
            hint = did_you_mean(option, known)
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise self.fail(f"unknown option '{option}' of pass '{cls.name}'.{hint} ({has})", start)
        if self.peek() != "=":
            raise self.fail(f"expected '=' after option '{option}', found {self.found()}.")
        self.at += 1
        self.spaces()
        place = self.at
        source = self.literal()
        try:
            value = ast.literal_eval(source)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            raise self.fail(f"the value of '{option}' is no Python literal: {source or 'nothing'}.", place) from None
        fitted, fits = _fit(value, known[option])
        if not fits:
            kind = _type_name(known[option])
            raise self.fail(f"option '{option}' of pass '{cls.name}' takes {kind}, not {value!r}.", place)
        return option, fitted, start

    def literal(self) -> str:
        """The source text up to the ',' or '}' that ends it; brackets and strings inside are skipped over."""
        start, text = self.at, self.text
        stack: list[str] = []
        while self.at < len(text):
            mark = text[self.at]
            if mark in "'\"":
                self.string(mark)
                continue
            if not stack and mark in ",}":
                break
            if mark in _OPEN:
                stack.append(_CLOSE[_OPEN.index(mark)])
            elif mark in _CLOSE and (not stack or stack.pop() != mark):
                raise self.fail(f"'{mark}' closes nothing.")
            self.at += 1
        if stack:
            raise self.fail(f"'{stack[-1]}' is missing.")
        return text[start : self.at].strip()

    def string(self, quote: str) -> None:
        start = self.at
        self.at += 1
        while self.at < len(self.text) and self.text[self.at] != quote:
            self.at += 2 if self.text[self.at] == "\\" else 1
        if self.at >= len(self.text):
            raise self.fail("this string does not end.", start)
        self.at += 1

    def build(self, cls: type[Pass], options: Mapping[str, Any], start: int) -> Pass:
        required = [
            f.name
            for f in dataclasses.fields(cls)
            if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        missing = [name for name in required if name not in options]
        if missing:
            raise self.fail(f"pass '{cls.name}' needs the option '{missing[0]}'.", start)
        try:
            return cls(**options)
        except PlanishError as error:  # the pass's own check of its options
            raise self.fail(f"pass '{cls.name}': {error}", start) from error
        except (TypeError, ValueError) as error:
            raise self.fail(f"pass '{cls.name}' does not take these options: {error}", start) from error


def option_types(cls: type[Pass]) -> dict[str, Any]:
    """The options of a pass class with their annotated types."""
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # an annotation that is imported for type checkers only
        hints = {}
    return {f.name: hints.get(f.name, Any) for f in dataclasses.fields(cls) if f.init}


def _type_name(hint: Any) -> str:
    if isinstance(hint, type) and not typing.get_args(hint):
        return {"int": "an int", "float": "a number", "bool": "True or False", "str": "a string"}.get(
            hint.__name__, f"a {hint.__name__}"
        )
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(hint))
    return str(hint).replace("typing.", "").replace("NoneType", "None")


def _fit(value: Any, hint: Any) -> tuple[Any, bool]:
    """Whether a literal fits an annotation, and the value in the annotated kind of container."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, str | typing.TypeVar):
        return value, True
    if origin in (typing.Union, types.UnionType):
        for choice in args:
            fitted, fits = _fit(value, choice)
            if fits:
                return fitted, True
        return value, False
    if origin is typing.Literal:
        return value, any(value == a and type(value) is type(a) for a in args)
    if hint is None or hint is type(None):
        return value, value is None
    if hint in (int, bool, str, bytes, complex):
        return value, type(value) is hint
    if hint is float:
        return (float(value), True) if type(value) in (int, float) else (value, False)
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return _fit_mapping(value, args)
    if isinstance(kind, type) and issubclass(kind, Sequence | set | frozenset):
        return _fit_items(value, kind, args)
    return value, not isinstance(kind, type) or isinstance(value, kind)


def _fit_mapping(value: Any, args: tuple[Any, ...]) -> tuple[Any, bool]:
    if not isinstance(value, dict):
        return value, False
    if not args:
        return value, True
    fitted = {_fit(k, args[0])[0]: _fit(v, args[1])[0] for k, v in value.items()}
    return fitted, all(_fit(k, args[0])[1] and _fit(v, args[1])[1] for k, v in value.items())


def _fit_items(value: Any, kind: type, args: tuple[Any, ...]) -> tuple[Any, bool]:
    if not isinstance(value, list | tuple | set | frozenset):
        return value, False
    container: type = tuple if kind in (tuple, Sequence) or not issubclass(kind, list | set | frozenset) else kind
    items = sorted(value, key=repr) if isinstance(value, set | frozenset) else list(value)
    if args and kind is tuple and args[-1] is not Ellipsis:
        if len(items) != len(args):
            return value, False
        hints: list[Any] = list(args)
    else:
        hints = [args[0] if args else Any] * len(items)
    pairs = [_fit(item, hint) for item, hint in zip(items, hints, strict=True)]
    if container is tuple and issubclass(kind, tuple) is False and isinstance(value, list):
        container = list  # a plain Sequence keeps what was written
    return container(item for item, _ in pairs), all(fits for _, fits in pairs)
