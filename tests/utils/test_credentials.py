"""Credentials in URLs are taken out of texts, whatever stands around them; nothing else is changed."""

import time
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec_dist.utils import CodecError, values_without_credentials, without_credentials

SECRET = "tiger-7f3a"
words = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://user:tiger@host/shards", "https://host/shards"),
        ("cannot read https://user:tiger@host:80/a.tar: gone", "cannot read https://host:80/a.tar: gone"),
        ("s3://key:tiger@bucket/x and s3://bucket/blocks.3@input", "s3://bucket/x and s3://bucket/blocks.3@input"),
        ("url='https://host/a?X-Amz-Signature=tiger&X-Amz-Date=1'", "url='https://host/a'"),
        ("https://u:ti/ger@host/a", "https://host/a"),
        ("https://u:t@i@host/a", "https://host/a"),
        ("https://u:tiger@a,https://v:tiger@b/c;s3://k:tiger@d", "https://a,https://b/c;s3://d"),
        ("https://u:ti\"g'er@host/a", "https://host/a"),
        ('["https://host", "a@b"] <a href="https://host">a@b</a>', '["https://host", "a@b"] <a href="https://host">a@b</a>'),
        ("GET /a?sv=1&sig=tiger HTTP/1.1", "GET /a?sv=1&sig=... HTTP/1.1"),
        ("http://[::1]:9000/a@b", "http://[::1]:9000/a@b"),
        ("s3://bucket/train-00000?.tar", "s3://bucket/train-00000?.tar"),
        ("/data/a?b/c@d k=3 token=5", "/data/a?b/c@d k=3 token=5"),
    ],
)  # fmt: skip
def test_a_text_keeps_all_but_the_credentials(text: str, clean: str) -> None:
    assert without_credentials(text) == clean
    assert without_credentials(clean) == clean


@given(
    before=words,
    after=words,
    scheme=st.sampled_from(["http", "https", "s3", "gs", "HTTPS"]),
    user=st.text(min_size=1, max_size=8),
    name=st.sampled_from(["sig", "X-Amz-Signature", "token", "X-Goog-Credential", "whatever", "a.b"]),
    form=st.sampled_from(["{scheme}://{user}:{secret}@host/a", "{scheme}://host/a?x=1&{name}={secret}", "{scheme}://{secret}@host"]),
)  # fmt: skip
def test_no_secret_of_a_url_is_left_anywhere(
    before: str, after: str, scheme: str, user: str, name: str, form: str
) -> None:
    url = form.format(scheme=scheme, user=quote(user, safe=""), secret=SECRET, name=name)
    text = f"{before} '{url}' {after}"
    assert SECRET not in without_credentials(text)
    assert SECRET not in str(CodecError(text))
    assert SECRET not in str(values_without_credentials({"a": [{"b": text}], "c": (text, 1)}))


@given(st.text(st.characters(codec="utf-8", exclude_characters=":=")))
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert without_credentials(text) == text


@pytest.mark.parametrize("text", ["a" * 100_000 + " https://host", "https://" + "a." * 50_000, "https://h@" * 10_000])
def test_long_texts_take_no_longer_than_their_length(text: str) -> None:
    # Less than a second; a search that starts again at every character takes minutes.
    started = time.process_time()
    without_credentials(text)
    assert time.process_time() - started < 10
