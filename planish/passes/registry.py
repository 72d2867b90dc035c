"""Passes by name: those of planish, those registered by the caller, those of installed packages.

A package offers passes through the entry point group ``planish.passes``::

    [project.entry-points."planish.passes"]
    fuse-special = "mypackage.passes:FuseSpecial"

They are imported when first asked for. A name has one owner: a second one is an error.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, overload

from planish.ir.errors import InputError, PlanishError, unknown
from planish.passes.base import ApproximatePass, ExactPass, Pass

GROUP = "planish.passes"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_passes: dict[str, type[Pass]] = {}

P = TypeVar("P", bound=type[Pass])


@overload
def register(cls: P) -> P: ...
@overload
def register() -> Callable[[P], P]: ...
def register(cls: P | None = None) -> P | Callable[[P], P]:
    """Class decorator: makes a pass known by its name, and its annotated fields its options.

    Raises:
        PlanishError: the name is taken or not kebab-case, or the class is neither exact nor approximate.
    """
    if cls is None:
        return register
    _require_pass(cls)
    if "__dataclass_params__" not in cls.__dict__:
        dataclass(frozen=True)(cls)  # changes the class in place
    known = _passes.get(cls.name)
    # The same class again (a re-imported module, a notebook cell run twice) replaces itself.
    if known is not None and _home(known) != _home(cls):
        raise PlanishError(f"two passes are named '{cls.name}': {_home(known)} and {_home(cls)}.")
    _passes[cls.name] = cls
    return cls


def get(name: str) -> type[Pass]:
    """The pass class of that name.

    Raises:
        InputError: there is none (with a did-you-mean), or the package that offers it does not import.
        PlanishError: two packages offer it.
    """
    _load_own()
    offered = _offered()
    if name in offered:
        _load_offered(name, offered[name])
    if name not in _passes:
        raise unknown("pass", name, names())
    return _passes[name]


def names() -> list[str]:
    """Names of all passes, sorted; does not import those of other packages."""
    _load_own()
    return sorted({*_passes, *_offered()})


def known() -> dict[str, type[Pass]]:
    """The pass classes that are loaded, by name."""
    _load_own()
    return dict(_passes)


def unregister(name: str) -> None:
    """Forgets a pass that was registered in this process; for tests and notebooks."""
    _passes.pop(name, None)


def _home(cls: type[Pass]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _require_pass(cls: type[Pass]) -> None:
    if not (isinstance(cls, type) and issubclass(cls, ExactPass | ApproximatePass)):
        raise PlanishError(f"{cls!r} is not a pass: derive it from ExactPass (RewritePass) or ApproximatePass.")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PlanishError(f"{_home(cls)}: a pass needs a name in kebab-case such as 'fuse-gelu', not {name!r}.")
    if issubclass(cls, ApproximatePass) and not isinstance(getattr(cls, "gives_up", None), str):
        raise PlanishError(f"{_home(cls)}: an approximate pass says in gives_up what its result may lose.")


@functools.cache
def _load_own() -> None:
    """Imports every module in the folders below planish/passes; each registers its passes."""
    package = importlib.import_module("planish.passes")
    for folder in pkgutil.iter_modules(package.__path__, "planish.passes."):
        if folder.ispkg:
            for module in pkgutil.iter_modules(importlib.import_module(folder.name).__path__, folder.name + "."):
                importlib.import_module(module.name)
    importlib.import_module("planish.passes.repeat")


@functools.cache
def _offered() -> dict[str, tuple[importlib.metadata.EntryPoint, ...]]:
    found: dict[str, tuple[importlib.metadata.EntryPoint, ...]] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def _load_offered(name: str, entries: tuple[importlib.metadata.EntryPoint, ...]) -> None:
    homes = {entry.value: entry for entry in entries}
    if len(homes) > 1:
        owners = " and ".join(f"{e.value} ({e.dist.name if e.dist else 'unknown package'})" for e in homes.values())
        raise PlanishError(f"two packages offer a pass named '{name}': {owners}.")
    entry = entries[0]
    owner = entry.dist.name if entry.dist else "unknown package"
    try:
        cls = entry.load()
    except PlanishError:
        raise
    except Exception as error:  # whatever a foreign module raises while it is imported
        raise InputError(f"pass '{name}' of {owner} can not be loaded from {entry.value}: {error}") from error
    if getattr(cls, "name", None) != name:
        raise PlanishError(
            f"{owner} offers {entry.value} as pass '{name}', and it is named {getattr(cls, 'name', None)!r}."
        )
    if _passes.get(name) is not cls:
        register(cls)
