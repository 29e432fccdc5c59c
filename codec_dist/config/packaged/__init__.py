"""Configs that come with the package, to be printed, edited and run."""

from importlib.resources import files

from codec_dist.config.sections import ConfigError
from codec_dist.utils import suggestion


def packaged_names() -> list[str]:
    """What :func:`packaged_config` knows."""
    return sorted(path.name.removesuffix(".yaml") for path in files(__name__).iterdir() if path.name.endswith(".yaml"))


def packaged_config(name: str) -> str:
    """The text of a packaged config, with its comments.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in packaged_names():
        raise ConfigError(f"there is no packaged config {name!r}: {suggestion(name, packaged_names())}")
    return (files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")
