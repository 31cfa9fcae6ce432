"""fm4m: 4M-style massively multimodal masked pretraining in JAX, sized for TPU pods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fm4m.loading import LoadedModel

__version__ = "0.1.0"


def load(path: Any, **options: Any) -> LoadedModel:
    """Configuration, modalities and parameters of a trained model; see `fm4m.loading.load` for paths and options."""
    from fm4m import loading  # orbax and flax take a second to import

    return loading.load(path, **options)
