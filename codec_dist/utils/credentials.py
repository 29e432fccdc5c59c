"""Credentials in URLs: kept where files are read and written, and taken out of all that people are shown."""

import re
from collections.abc import Mapping
from typing import Any

SCHEME = r"[A-Za-z][A-Za-z0-9+.-]{0,30}"  # no longer, as it is looked for at every character
# A quote ends a URL, but not before the end of a password that holds one; another URL ends it, too.
URL = re.compile(rf"""(?P<scheme>{SCHEME})://(?P<rest>(?:[^\s/@<>]*@)?(?:(?!{SCHEME}://)[^\s"'<>`\\])*)""")
# A query begins with a name and its value; a lone `?` may belong to a pattern of file names.
QUERY = re.compile(r"\?[^=?/]+=.*")
# What is left of a signed address where a message tells its path alone.
SECRET = re.compile(
    r"(?P<name>(?<=[?&;])(?:x-(?:amz|goog)-\w+|signature|sig|\w*token|\w*password|\w*secret|\w*api_?key|key-pair-id"
    r"|\w*access_?key_?id|policy|hmac)=)[^&\s\"'<>]+",
    re.IGNORECASE,
)


def without_credentials(text: str) -> str:
    """A text in which every URL is without user, password and query, which may hold a signature or a token.

    All else stays as it is, so that a path without credentials is the same path.
    """
    if "://" in text:
        text = URL.sub(_plain, text)
    return SECRET.sub(r"\g<name>...", text) if "=" in text else text


def values_without_credentials(value: Any) -> Any:
    """The same for all texts in nested plain values (mappings, lists and tuples)."""
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, Mapping):
        return {key: values_without_credentials(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(values_without_credentials(inner) for inner in value)
    return value


def _plain(url: re.Match[str]) -> str:
    rest = url["rest"]
    authority, slash, path = rest.partition("/")
    if "@" in authority:
        rest = authority.rpartition("@")[2] + slash + path
    elif "@" in path and not re.fullmatch(r"[^:]*(:\d*)?|\[.*\](:\d*)?", authority):
        # Not HOST or HOST:PORT: a password with a slash in it, which should have been percent-encoded.
        rest = path.rpartition("@")[2]
    return f"{url['scheme']}://{QUERY.sub('', rest)}"
