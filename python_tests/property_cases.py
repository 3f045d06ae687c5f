"""What the property tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import strategies as st

T = TypeVar("T")


def few_or_many(few: int, many: int) -> pytest.MarkDecorator:
    """Run a test with so few ``examples``, and once more, slowly, with many."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


numbers = (
    st.integers()
    | st.sampled_from([0, 1, 2**31, 2**53, 2**63, -(2**63), 10**400])
    | st.floats(allow_nan=False, allow_infinity=False)
)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(st.characters(exclude_categories=()), max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
"""Anything that JSON can hold, surrogates without a partner included."""


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` after bytes were changed, cut out, put in, repeated, or cut off."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(start + 32, len(content))) | st.just(len(content)))
        piece = draw(st.binary(max_size=4) | st.just(2 * content[start:end]))
        content = content[:start] + piece + content[end:]
    return content


@st.composite
def altered(draw: st.DrawFn, body: Any) -> Any:
    """``body`` with another value somewhere, at any depth; items may also go or be repeated."""
    if not isinstance(body, dict | list) or not body or draw(st.integers(0, 4)) == 0:
        return draw(values)
    key = draw(st.sampled_from(list(body) if isinstance(body, dict) else range(len(body))))
    what = draw(st.sampled_from(["alter", "alter", "alter", "drop", "add"]))
    changed = body.copy()
    if what == "drop":
        del changed[key]
    elif isinstance(changed, list) and what == "add":
        changed.insert(key, draw(values | st.just(body[key])))
    elif what == "add":
        changed[draw(st.text(max_size=5))] = draw(values)
    else:
        changed[key] = draw(altered(body[key]))
    return changed


def read(reader: Callable[[], T], *errors: type[Exception]) -> T | None:
    """What ``reader`` reads; None where it raises what it may, in few words."""
    try:
        return reader()
    except errors as error:
        message = str(error)
    assert len(message) < 1500, message[:2000]
    return None
