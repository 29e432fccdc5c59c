"""From YAML and command-line overrides to a frozen :class:`Config`, and back to YAML."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from codec_dist.config.sections import Config, ConfigError, PathField
from codec_dist.utils import suggestion, values_without_credentials, write_bytes_atomically

NOT_PATHS = {"", "default", "none"}

FLOAT = re.compile(
    r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
REPLACED = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config, apply ``--section.key value`` overrides, and validate it.

    Relative paths in the file are taken from the file's folder, those in overrides from the current
    folder; all are absolute in the result.

    Args:
        path: the YAML file.
        overrides: words of a command line, e.g. ``["--attribution.microbatch", "32"]``. Values are read
            as YAML; list items are named by number (``--sae.groups.0.training.epochs 50``).

    Raises:
        ConfigError: missing file, bad YAML, unknown key, or a value out of range.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the config {path} is not a UTF-8 text file: {error.reason}") from error
    try:
        values = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the config {path} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the config {path} holds no sections: expected `run:`, `data:`, `model:` and so on")
    values = _with_defaults(_absolute_paths(values, path.resolve().parent))
    for key, value in _parse_overrides(overrides):
        override: Any = value
        for part in reversed(key):
            override = {part: override}
        _merge(values, _absolute_paths(override, Path.cwd()), key)
    return parse_config(values, source=str(path))


def store_of_run(directory: str | Path) -> str:
    """Folder or URL of the store of the run in a folder: as the run's own config says, else ``DIRECTORY/store``.

    Raises:
        ConfigError: the run's config cannot be read.
    """
    file = Path(directory) / "config.yaml"
    elsewhere = load_config(file).store.location if file.is_file() else None
    return elsewhere or str(Path(directory) / "store")


def parse_config(values: Mapping[str, Any], source: str = "config") -> Config:
    """Validate nested plain values; ``source`` names them in error messages.

    Raises:
        ConfigError: unknown key (with the nearest known one) or a value out of range.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        details = error.errors()
        # An unknown key is the likelier cause of a missing one, so it is named first.
        first = next((entry for entry in details if entry["type"] == "extra_forbidden"), details[0])
        more = f" (and {len(details) - 1} more problems)" if len(details) > 1 else ""
        raise ConfigError(f"{source}: {_explain(first)}{more}") from error


def save_config(config: Config, path: Path, *, with_credentials: bool = False) -> None:
    """Write the resolved config as YAML, unless the same is there already.

    Paths below the file's folder are written relative to it, so that the folder can be moved. URLs are written
    without user, password and query, unless ``with_credentials``.
    """

    def relative(location: str) -> str:
        folder = path.resolve().parent
        return os.path.relpath(location, folder) if Path(location).is_relative_to(folder) else location

    values = _map_paths((config if with_credentials else shown_config(config)).model_dump(mode="json"), relative)
    content = write_yaml(values).encode()
    if not path.is_file() or path.read_bytes() != content:
        write_bytes_atomically(path, content)


def shown_config(config: Config) -> Config:
    """A config for people and files: the same, with URLs that are without user, password and query."""
    values = config.model_dump(mode="json")
    shown = values_without_credentials(values)
    return config if shown == values else Config.model_validate(shown)


def config_schema() -> dict[str, Any]:
    """The JSON schema of a config, for editors that complete and check YAML."""
    return Config.model_json_schema()


def config_reference() -> str:
    """Every ``--section.key`` with its default and meaning, one per line."""
    return "\n".join(_reference(Config, "--"))


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in what the file leaves out, so that an override may change a part of a default."""
    filled = dict(values)
    for name, field in Config.model_fields.items():
        section = _section_in(field.annotation)
        given = values.get(name, {})
        if section is not None and isinstance(given, dict):
            fields = section.model_fields.items()
            defaults = {key: inner.default for key, inner in fields if not inner.is_required()}
            filled[name] = _plain(defaults) | given
    return filled


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value


def _parse_overrides(words: Sequence[str]) -> Iterator[tuple[list[str], Any]]:
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"unexpected argument {word!r}: overrides look like `--section.key value`")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not remaining:
                raise ConfigError(f"the override --{key} has no value")
            text = remaining.pop(0)
        try:
            yield key.split("."), read_yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of --{key} cannot be read: {_one_line(error)}") from error


def _merge(values: Any, override: Any, key: list[str]) -> None:
    """Set in nested ``values`` what the chain of one-item mappings ``override`` says at ``key``."""
    for position, part in enumerate(key):
        override = override[part]
        if isinstance(values, list):
            if not part.isdecimal() or int(part) >= len(values):
                raise ConfigError(f"--{'.'.join(key)}: there is no item {part!r} (there are {len(values)})")
            part = int(part)  # type: ignore[assignment]
        elif not isinstance(values, dict):
            raise ConfigError(f"--{'.'.join(key)}: {'.'.join(key[:position])} holds a value, not settings")
        if position == len(key) - 1:
            values[part] = override
            return
        if isinstance(values, dict) and values.get(part) is None:
            values[part] = {}
        values = values[part]


def _explain(detail: ErrorDetails) -> str:
    location = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = _keys_at(detail["loc"][:-1])
        return f"unknown key `{location}`: {suggestion(str(detail['loc'][-1]), known)}"
    if detail["type"] == "missing":
        return f"`{location}` is missing: set it in the file or with --{location} VALUE"
    found = "" if isinstance(detail["input"], dict | list) else f" (found {detail['input']!r})"
    return f"`{location}`: {detail['msg']}{found}"


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            inner = _section_in(model.model_fields[part].annotation)
            if inner is None:
                return []
            model = inner
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, getattr(annotation, "__args__", ()))), None)


def _path_fields(
    model: type[BaseModel] = Config, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], PathField]]:
    for name, field in model.model_fields.items():
        annotated = [*field.metadata, *(m for a in getattr(field.annotation, "__args__", ()) for m in _metadata(a))]
        inner = _section_in(field.annotation)
        marks = [item for item in annotated if isinstance(item, PathField)]
        if marks:
            yield (*prefix, name), marks[0]
        elif inner is not None:
            yield from _path_fields(inner, (*prefix, name))


def _metadata(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__metadata__", ())


def _map_paths(values: Any, change: Callable[[str], str]) -> Any:
    """A copy of nested plain values in which every field marked as a path is changed."""

    def is_word(text: str, mark: PathField) -> bool:
        return text in NOT_PATHS or mark.is_name(text)

    def visit(node: Any, route: tuple[str, ...], mark: PathField) -> Any:
        if not isinstance(node, dict) or not route:
            if route or not isinstance(node, str) or "://" in node or is_word(node, mark):
                return node
            changed = change(node)
            return f"./{changed}" if is_word(changed, mark) else changed
        return {key: visit(value, route[1:], mark) if key == route[0] else value for key, value in node.items()}

    for route, mark in _path_fields():
        values = visit(values, route, mark)
    return values


def _absolute_paths(values: Any, folder: Path) -> Any:
    return _map_paths(values, lambda location: os.path.normpath(folder / Path(location).expanduser()))


def _reference(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = _section_in(field.annotation)
        many = getattr(field.annotation, "__origin__", None) is tuple
        if inner is not None and inner.__name__ != "Choice":
            if field.default is None:
                yield f"  {prefix}{name}\n      {field.description or ''} [none]"
            yield from _reference(inner, f"{prefix}{name}.{'0.' if many else ''}")
            continue
        default = field.default
        if default is PydanticUndefined:
            shown = "required"
        elif isinstance(default, BaseModel):
            shown = str(default.model_dump(mode="json"))
        elif isinstance(default, tuple):
            shown = str(list(default))
        else:
            shown = "none" if default is None else str(default)
        yield f"  {prefix}{name}\n      {field.description or ''} [{shown}]"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ---- YAML as people write it: `5e-5` is a number, `off` and `2024-05-01` are words


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
