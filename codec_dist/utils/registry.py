"""Names that a config may use, and what each builds."""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, Generic, TypeVar

from codec_dist.utils.errors import CodecError
from codec_dist.utils.names import suggestion

T = TypeVar("T")
Factory = TypeVar("Factory", bound=Callable[..., Any])


def import_module(name: str) -> ModuleType:
    """A module by its name; also one in the current folder, where installed commands do not look by themselves.

    Raises:
        Exception: whatever the module raises.
    """
    importlib.invalidate_caches()
    top = name.partition(".")[0]
    if top and top not in sys.modules and importlib.util.find_spec(top) is None:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


class Registry(Generic[T]):
    """A table from a name to a factory (a class or a function), which a user can extend.

    Args:
        kind: names the entries in error messages.
        error: class of the errors raised.
        imported: if given, names of the form ``package.module:attribute`` are imported, and this makes a
            factory of what is found there, or refuses it. It gets the thing and its name.
    """

    def __init__(
        self,
        kind: str,
        error: type[CodecError] = CodecError,
        imported: Callable[[Any, str], Callable[..., T]] | None = None,
    ) -> None:
        self.kind = kind
        self._error, self._imported = error, imported
        self._factories: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """Decorator that enters a factory under ``name``."""

        def enter(factory: Factory) -> Factory:
            if name in self._factories:
                raise self._error(f"the {self.kind} {name!r} is registered already: choose another name")
            self._factories[name] = factory
            return factory

        return enter

    def factory(self, name: str) -> Callable[..., T]:
        """The factory called ``name``; an unknown name is refused with the nearest known ones."""
        if name in self._factories:
            return self._factories[name]
        if self._imported is not None and ":" in name:
            return self._imported(self._import(name), name)
        hint = ", or give an import path package.module:name" if self._imported is not None else ""
        raise self._error(f"unknown {self.kind} {name!r}: {suggestion(name, self._factories)}{hint}")

    def _import(self, name: str) -> Any:
        module, _, attribute = name.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise self._error(f"cannot import the {self.kind} {name!r}: {reason}") from error

    def build(self, name: str, options: Mapping[str, Any] | None = None, /, **context: Any) -> T:
        """Build the entry ``name`` with ``options`` from a config and ``context`` from the caller.

        Raises:
            CodecError: unknown name, unknown or missing option, or a value the factory refuses.
        """
        factory = self.factory(name)
        options = dict(options or {})
        accepted = inspect.signature(factory).parameters
        for option in options:
            if option not in accepted or option in context:
                known = [known for known in accepted if known not in context]
                raise self._error(f"the {self.kind} {name!r} has no option {option!r}: {suggestion(option, known)}")
        missing = [
            parameter.name
            for parameter in accepted.values()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and parameter.name not in options
            and parameter.name not in context
        ]
        if missing:
            raise self._error(f"the {self.kind} {name!r} needs the option {missing[0]!r}")
        # Whatever the code of a user raises is reported with its name.
        reported = Exception if ":" in name else (TypeError, ValueError)
        try:
            return factory(**options, **context)
        except self._error:
            raise
        except reported as error:
            raise self._error(f"the {self.kind} {name!r} refuses its options {options}: {error}") from error

    def build_choice(self, value: object) -> T | None:
        """Build what a user or a config names: a name, or ``{name: ..., options: {...}}``; None for anything else.

        Raises:
            CodecError: as :meth:`build`.
        """
        if isinstance(value, str):
            return self.build(value)
        if isinstance(value, Mapping) and set(value) <= {"name", "options"} and isinstance(value.get("name"), str):
            return self.build(value["name"], value.get("options"))
        return None

    def __contains__(self, name: str) -> bool:
        return name in self._factories

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._factories))
