"""Light heads on stored embeddings: models, losses, training, metrics, predictions.

``HeadClassifier`` and ``Fields`` are for scikit-learn, and are imported when they are asked for:
the names of the heads alone need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmc.heads.estimator import HeadClassifier as HeadClassifier
    from mmc.heads.fields import Fields as Fields

_PUBLIC = {"HeadClassifier": "mmc.heads.estimator", "Fields": "mmc.heads.fields"}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
