from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.ir.errors import InputError
from planish.ir.target import Target


@given(
    st.builds(
        Target,
        runtime=st.sampled_from(["ort", "tvm"]),
        device=st.sampled_from(["cpu", "cuda"]),
        arch=st.sampled_from([None, "sm_75", "sm_90"]),
        threads=st.integers(0, 9999),
        memory=st.none() | st.integers(0, 10**14),
        dtype=st.sampled_from([None, "float32", "bfloat16"]),
        options=st.sampled_from([(), (("session.intra_op.allow_spinning", "0"),)]),
    )
)
def test_a_target_prints_as_what_parses_back(target: Target) -> None:
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ort-cpu", Target()),
        (" ort-cpu : threads=2 , memory=4GiB ", None),
        ("ort-cpu:threads=2,memory=4GiB", Target(threads=2, memory=4 << 30)),
        ("ort-cpu:memory=512mb", Target(memory=512_000_000)),
        ("tvm-cuda:sm_75", Target("tvm", "cuda", "sm_75")),
    ],
)
def test_parsing(text: str, expected: Target | None) -> None:
    if expected is None:
        with pytest.raises(InputError, match="unknown target"):
            Target.parse(text)
    else:
        assert Target.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ort-cpuu", "unknown target 'ort-cpuu'. Did you mean 'ort-cpu'?"),
        ("", "unknown target ''."),
        ("ort-cpu:thread=2", "Did you mean 'threads'?"),
        ("ort-cpu:threads=two", "threads='two' is not a number from 0 to 9999"),
        ("ort-cpu:threads=-1", "threads='-1' is not a number from 0 to 9999"),
        ("ort-cpu:memory=lots", "memory='lots' is not a size such as 512MiB or 4GiB"),
    ],
)
def test_a_wrong_target_is_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Target.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_target_that_is_no_string_is_refused() -> None:
    with pytest.raises(InputError, match="not int"):
        Target.parse(3)  # type: ignore[arg-type]
