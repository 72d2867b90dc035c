"""Passes by name: registration, plug-ins through entry points, and their mistakes."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from planish.ir.errors import InputError, PlanishError
from planish.ir.program import Program
from planish.passes import registry
from planish.passes.base import ApproximatePass, ExactPass, Pass, PassContext, PassResult
from planish.passes.registry import register


def made(pass_name: str, base: type[Pass] = ExactPass, module: str = "one") -> type[Any]:
    def apply(self: Any, program: Program, ctx: PassContext) -> PassResult:
        return PassResult(False)

    return type("Made", (base,), {"name": pass_name, "apply": apply, "__module__": module})


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    registry.names()
    known = dict(registry._passes)
    yield
    registry._passes.clear()
    registry._passes.update(known)


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Entry points that installed packages would have, by name."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(registry, "_offered", lambda: found)
    return found


def entry(name: str, cls: Any, package: str = "other") -> Any:
    def load() -> Any:
        if isinstance(cls, Exception):
            raise cls
        return cls

    return SimpleNamespace(name=name, value=f"{package}.passes:{name}", load=load, dist=SimpleNamespace(name=package))


def test_register_makes_options_of_annotated_fields() -> None:
    @register
    class Fresh(ExactPass):
        name = "test-fresh"
        rate: float = 0.5

        def apply(self, program: Program, ctx: PassContext) -> PassResult:
            return PassResult(False)

    assert registry.get("test-fresh") is Fresh
    assert str(Fresh(rate=0.25)) == "test-fresh{rate=0.25}"  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        Fresh().rate = 1.0  # type: ignore[misc]


def test_a_dataclass_is_left_as_it_is() -> None:
    @dataclass(frozen=True)
    class Own(ExactPass):
        name: ClassVar[str] = "test-own"

        def apply(self, program: Program, ctx: PassContext) -> PassResult:
            return PassResult(False)

    assert register(Own) is Own and register()(Own) is Own


def test_a_name_has_one_owner() -> None:
    register(made("test-twice", module="one"))
    register(made("test-twice", module="one"))  # the same class again: a module that was imported anew
    with pytest.raises(PlanishError, match=r"two passes are named 'test-twice': one\.Made and two\.Made"):
        register(made("test-twice", module="two"))


@pytest.mark.parametrize("name", ["Upper", "under_score", "trailing-", "", "space d", None])
def test_names_are_kebab_case(name: Any) -> None:
    with pytest.raises(PlanishError, match="kebab-case"):
        register(made(name))


def test_a_pass_is_exact_or_approximate() -> None:
    with pytest.raises(PlanishError, match="neither|not a pass"):
        register(made("test-neither", base=Pass))
    with pytest.raises(PlanishError, match="gives_up"):
        register(made("test-lossy", base=ApproximatePass))


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(InputError, match=r"unknown pass 'eliminate-ded-code'\. Did you mean 'eliminate-dead-code'\?"):
        registry.get("eliminate-ded-code")


def test_built_in_passes_are_there() -> None:
    assert {"repeat", "eliminate-dead-code", "fold-constants"} <= set(registry.names())
    for name, cls in registry.known().items():
        assert cls.name == name and cls.__doc__, f"{name} has no docstring"


def test_a_plugin_is_loaded_when_asked_for(offered: dict[str, Any]) -> None:
    cls = made("test-plugin")
    loads = []
    point = entry("test-plugin", cls)
    load, point.load = point.load, lambda: loads.append(1) or load()
    offered["test-plugin"] = (point,)
    assert "test-plugin" in registry.names() and not loads
    assert registry.get("test-plugin") is cls and loads


def test_mistakes_of_plugins(offered: dict[str, Any]) -> None:
    offered["test-broken"] = (entry("test-broken", ImportError("no module named 'gone'")),)
    with pytest.raises(InputError, match=r"pass 'test-broken' of other can not be loaded from .*no module named"):
        registry.get("test-broken")
    offered["test-other"] = (entry("test-other", made("test-named")),)
    with pytest.raises(PlanishError, match="offers other.passes:test-other as pass 'test-other'"):
        registry.get("test-other")
    offered["test-both"] = (entry("test-both", made("test-both"), "one"), entry("test-both", made("test-both"), "two"))
    with pytest.raises(PlanishError, match=r"two packages offer a pass named 'test-both': .*\(one\) and .*\(two\)"):
        registry.get("test-both")
    offered["fold-constants"] = (entry("fold-constants", made("fold-constants", module="evil")),)
    with pytest.raises(PlanishError, match="two passes are named 'fold-constants'"):
        registry.get("fold-constants")
    offered["test-function"] = (entry("test-function", SimpleNamespace(name="test-function")),)
    with pytest.raises(PlanishError, match="is not a pass"):
        registry.get("test-function")


def test_entry_points_are_read_from_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("test-installed", "package.module:Class", registry.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == registry.GROUP else [])
    registry._offered.cache_clear()
    try:
        assert "test-installed" in registry.names()
    finally:
        monkeypatch.undo()
        registry._offered.cache_clear()
