"""What a training did, for the caller."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmc.heads.artifact import Run
from mmc.heads.engine import Position
from mmc.heads.training import Setup
from mmc.store import EmbeddingStore


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a training did."""

    run: Run
    features: dict[str, str]
    """Role -> feature."""
    rows: dict[str, int]
    """Rows used of each split."""
    metrics: dict[str, dict[str, Any]]
    """Split -> metrics at the tuned thresholds; of several processes only the main one measures."""
    epochs: int
    """Passes over the training rows, all stages together."""
    seconds: float
    """Everything, loading and measuring included, writing the run not."""
    train_seconds: float
    """The steps alone."""
    rate: float
    """Samples per second of the steps."""
    batch_size: int
    lr: float
    resumed: bool
    notes: list[str] = field(default_factory=list)
    search: dict[str, Any] = field(default_factory=dict)
    """Results of --sweep, --seeds and --folds, as the run records them."""

    @classmethod
    def of(cls, setup: Setup, run: Run, position: Position, *, resumed: bool) -> "TrainReport":
        """The report of a run whose `training` is set."""
        return cls(
            run=run,
            features=setup.features,
            rows={name: len(getattr(setup.splits, name)) for name in ("train", "val", "test")},
            metrics=run.metrics,
            epochs=run.training["epochs"],
            seconds=run.training["seconds"],
            train_seconds=position.train_seconds,
            rate=run.training["rate"],
            batch_size=setup.batch_size,
            lr=setup.lr,
            resumed=resumed,
            notes=[*setup.notes, *position.notes],
            search=run.search,
        )


def effort(setup: Setup, position: Position, seconds: float) -> dict[str, Any]:
    """`Run.training`."""
    stepping = position.train_seconds
    return {
        "seconds": round(seconds, 3),
        "train_seconds": round(stepping, 4),
        "rows": position.train_rows,
        "epochs": position.train_rows // max(len(setup.splits.train), 1),
        "rate": round(position.train_rows / stepping, 1) if stepping else 0.0,
        "batch_size": setup.batch_size,
        "lr": setup.lr,
        "device": str(setup.device),
        "notes": list(position.notes),
        **place(setup.store),
    }


def place(store: EmbeddingStore) -> dict[str, str]:
    """Where the store is, said so that it means the same from every folder; arrays are nowhere."""
    if not isinstance(store, EmbeddingStore):
        return {}
    return {"store": store.path if "://" in store.path else str(Path(store.path).absolute())}
