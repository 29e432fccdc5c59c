"""The packaged demo: real handwritten digits, a small classifier trained on them, and the config of a run.

The classifier can be built (as a model spec) without importing the stages that `run_demo` needs.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codec_dist.demo.run import demo_config, run_demo

__all__ = ["demo_config", "run_demo"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from codec_dist.demo import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
