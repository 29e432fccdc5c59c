"""Identifiers: ASCII alone, short enough, and different for different texts."""

import re

from hypothesis import example, given
from hypothesis import strategies as st

from codec_dist.utils import identifier

ALLOWED = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@given(st.text(max_size=300), st.integers(16, 128))
@example("réseau", 128)
@example("", 128)
@example("🐘" * 200, 64)
@example("a/b", 128)
@example("..", 128)
def test_any_text_has_one(text: str, longest: int) -> None:
    name = identifier(text, longest)
    assert ALLOWED.fullmatch(name)
    assert len(name) <= longest
    assert identifier(text, longest) == name


@given(st.text(max_size=40), st.text(max_size=40))
@example("reseau", "réseau")
@example("a b", "a-b")
@example("a/b", "a b")
@example("few digits", identifier("few digits"))
def test_no_two_texts_share_one(first: str, second: str) -> None:
    assert (identifier(first) == identifier(second)) == (first == second)


def test_what_is_one_already_stays() -> None:
    for name in ("digits", "ResNet-50_v1.5", "a"):
        assert identifier(name) == name
    assert identifier("réseau profond").startswith("reseau-profond-")
