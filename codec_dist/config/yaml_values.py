"""YAML as people write it: `5e-5` is a number, `off` and `2024-05-01` are words."""

import re
from typing import Any

import yaml

FLOAT = re.compile(
    r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
REPLACED = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2 instead of 1.1."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT_RESOLVER = ("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver(*_FLOAT_RESOLVER)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper that quotes texts which look like numbers in YAML 1.2, too: ``0E0``."""


_Dumper.add_implicit_resolver(*_FLOAT_RESOLVER)


def write_yaml(values: Any) -> str:
    """Values as a YAML text that :func:`read_yaml` reads as the same."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(text: str) -> Any:
    """The value that a YAML text stands for: plain mappings, lists, texts, numbers, booleans, null.

    Raises:
        yaml.YAMLError: the text is not YAML, or asks for anything else.
    """
    return yaml.load(text, Loader=_Loader)  # noqa: S506 (derived from SafeLoader)
