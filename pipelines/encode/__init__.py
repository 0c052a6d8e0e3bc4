"""From pair shards to latents and text embeddings: plan, encoders, geometry, fingerprint.

May import units, the configuration and `pipelines.dataset`. Functions are loaded when first asked for, so that
importing a light module of this room does not load Ray Data's part.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.encode.execution import encode

__all__ = ["encode"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipelines.encode import execution

    return getattr(execution, name)
