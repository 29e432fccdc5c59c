"""Models as they come: built from a spec, with weights and preprocessing, and their layers by name.

Only layer names are imported with the package; loading (which needs pydantic and Pillow) comes when it is asked for.
"""

from typing import TYPE_CHECKING, Any

from codec_dist.models.errors import ModelError, model_call, model_line, reason_of
from codec_dist.models.layers import LayerKey, resolve_layers

if TYPE_CHECKING:
    from codec_dist.models.loading import LoadedModel, load_model
    from codec_dist.models.preprocessing import Preprocessing

__all__ = [
    "LayerKey",
    "LoadedModel",
    "ModelError",
    "Preprocessing",
    "load_model",
    "model_call",
    "model_line",
    "reason_of",
    "resolve_layers",
]


def __getattr__(name: str) -> Any:
    if name in ("LoadedModel", "load_model"):
        from codec_dist.models import loading

        return getattr(loading, name)
    if name == "Preprocessing":
        from codec_dist.models.preprocessing import Preprocessing

        return Preprocessing
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
