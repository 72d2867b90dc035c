"""Pipeline strings: what parses, what it means, and where the caret points when it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.ir.errors import InputError
from planish.ir.program import Program
from planish.passes import registry
from planish.passes.base import ExactPass, PassContext, PassResult
from planish.passes.pipeline import as_passes, format_pipeline, parse_pipeline
from planish.passes.registry import register


@dataclass(frozen=True)
class Options(ExactPass):
    name: ClassVar[str] = "test-options"

    layers: tuple[int, ...] = ()
    items: Sequence[int] = ()
    rate: float = 0.5
    count: int = 1
    text: str = ""
    flag: bool = False
    limit: int | None = None
    mode: Literal["fast", "small"] = "fast"
    sizes: dict[str, int] | None = None
    pair: tuple[int, str] = (0, "")

    def __post_init__(self) -> None:
        if self.count < 0:
            raise InputError(f"count is {self.count}; it must not be negative.")

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        return PassResult(False)


@dataclass(frozen=True)
class Needs(Options):
    name: ClassVar[str] = "test-needs"

    r: int = 0


@pytest.fixture(autouse=True, scope="module")
def passes() -> Iterator[None]:
    register(Options)
    register(Needs)
    yield
    registry.unregister("test-options")
    registry.unregister("test-needs")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  ", []),
        ("test-options", [Options()]),
        (" test-options , test-needs{ r = 13 } ", [Options(), Needs(r=13)]),
        ("test-options{}", [Options()]),
        ("test-options{layers=[3,7]},test-needs{r=-1}", [Options(layers=(3, 7)), Needs(r=-1)]),
        ("test-options{text='a,b}{=',rate=1}", [Options(text="a,b}{=", rate=1.0)]),
        ("test-options{text='it\\'s',}", [Options(text="it's")]),
        ('test-options{text="\'"}', [Options(text="'")]),
        ("test-options{sizes={'a': 1, 'b': 2},limit=None}", [Options(sizes={"a": 1, "b": 2})]),
        ("test-options{pair=(1,'x'),flag=True,mode='small'}", [Options(pair=(1, "x"), flag=True, mode="small")]),
        ("test-options\n,\ttest-options", [Options(), Options()]),
    ],
)
def test_what_parses(text: str, expected: list[Any]) -> None:
    assert parse_pipeline(text) == expected


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("test-optons", 0, "unknown pass 'test-optons'. Did you mean 'test-options'?"),
        ("test-options,nothing-like-it", 13, "unknown pass 'nothing-like-it'."),
        ("test-options,", 13, "expected the name of a pass, found the end"),
        (",test-options", 0, "expected the name of a pass, found ','"),
        ("test-options test-options", 13, "expected ',' or the end, found 't'"),
        ("test-options}", 12, "expected ',' or the end, found '}'"),
        ("test-options{cuont=1}", 13, "unknown option 'cuont' of pass 'test-options'. Did you mean 'count'?"),
        ("test-options{count 1}", 19, "expected '=' after option 'count', found '1'"),
        ("test-options{count=}", 19, "no Python literal: nothing"),
        ("test-options{count=os.getcwd()}", 19, "no Python literal: os.getcwd()"),
        ("test-options{count=1", 20, "expected ',' or '}' in the options of 'test-options', found the end"),
        ("test-options{layers=[1,2}", 24, "'}' closes nothing"),
        ("test-options{layers=[1,2", 24, "']' is missing"),
        ("test-options{text='abc}", 18, "this string does not end"),
        ("test-options{count='3'}", 19, "takes an int, not '3'"),
        ("test-options{count=True}", 19, "takes an int, not True"),
        ("test-options{flag=1}", 18, "takes True or False, not 1"),
        ("test-options{rate='x'}", 18, "takes a number, not 'x'"),
        ("test-options{layers=3}", 20, "takes tuple[int, ...], not 3"),
        ("test-options{layers=[1,'a']}", 20, "takes tuple[int, ...]"),
        ("test-options{mode='slow'}", 18, "takes one of 'fast', 'small', not 'slow'"),
        ("test-options{pair=(1,2,3)}", 18, "takes tuple[int, str]"),
        ("test-options{count=1,count=2}", 21, "option 'count' of pass 'test-options' is given twice"),
        ("test-options,test-options{count=-1}", 13, "count is -1; it must not be negative"),
        ("test-options{count=1}{count=2}", 21, "expected ',' or the end, found '{'"),
    ],
)
def test_what_does_not(text: str, place: int, problem: str) -> None:
    with pytest.raises(InputError) as error:
        parse_pipeline(text)
    message, shown, caret = str(error.value).split("\n")
    assert problem in message
    assert shown == "  " + text
    assert caret == "  " + " " * place + "^"
    assert error.value.exit_code == 2


def test_not_a_string() -> None:
    with pytest.raises(InputError, match="not int"):
        parse_pipeline(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="give an instance: Options"):
        as_passes([Options])  # type: ignore[list-item]
    with pytest.raises(InputError, match="object of class dict"):
        as_passes([{}])  # type: ignore[list-item]
    assert as_passes(["test-options", Needs(r=2)]) == [Options(), Needs(r=2)]


def test_a_missing_option_is_named() -> None:
    with pytest.raises(InputError, match="pass 'repeat' needs the option 'passes'"):
        parse_pipeline("repeat{rounds=3}")


def test_defaults_are_left_out() -> None:
    assert format_pipeline([Options(), Options(count=2, rate=0.5)]) == "test-options,test-options{count=2}"


options = st.builds(
    Options,
    layers=st.lists(st.integers(), max_size=4).map(tuple),
    items=st.lists(st.integers(), max_size=3),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    count=st.integers(0, 1 << 70),
    text=st.text(max_size=12),
    flag=st.booleans(),
    limit=st.none() | st.integers(),
    mode=st.sampled_from(["fast", "small"]),
    sizes=st.none() | st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    pair=st.tuples(st.integers(), st.text(max_size=3)),
)


@given(st.lists(options | st.builds(Needs, r=st.integers()), max_size=4))
def test_printing_parses_back(pipeline: list[Any]) -> None:
    text = format_pipeline(pipeline)
    assert parse_pipeline(text) == pipeline
    assert format_pipeline(parse_pipeline(text)) == text


@given(st.text(alphabet="test-opinsrcu{}[]()=,'\"\\ 0123456789_\n", max_size=40))
def test_any_text_parses_or_says_where_it_does_not(text: str) -> None:
    try:
        parse_pipeline(text)
    except InputError as error:
        shown, caret = str(error).split("\n")[-2:]
        assert caret.endswith("^") and len(caret) <= len(shown) + 1
