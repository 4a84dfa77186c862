"""A small store with known answers, and a run that gives them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from mmc.store import EmbeddingStore, FieldSpec

Rows = npt.NDArray[np.int64]
LABELS = {
    "multilabel": ("bus", 'a "quoted" label', "sea, sky", "zug", "never seen"),
    "binary": ("0", "1"),
    "multiclass": ("cat", "dog", "eel"),
}
WIDTH = 8
SHARD_ROWS = 16


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., EmbeddingStore]:
    """Makes a store: 60 samples, features ``clip/image`` and ``clip/text`` of width 8.

    The first values of the image features tell the labels. Splits go train, train, val, test;
    samples ``s7`` and ``s11`` failed, samples in ``unlabelled`` have no labels, and of the others'
    labels the share ``unknown`` is not known.
    """

    def make(
        task: str = "multilabel",
        *,
        n: int = 60,
        name: str = "store",
        noise: float = 0.3,
        failed: tuple[int, ...] = (7, 11),
        unlabelled: tuple[int, ...] = (3,),
        unknown: float = 0.0,
        label_set: tuple[str, ...] | None = None,
        identity: dict[str, Any] | None = None,
        source: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> EmbeddingStore:
        names = label_set or LABELS[task]
        random = np.random.default_rng(seed)
        if task == "multilabel":
            truth = random.random((n, len(names))) < 0.35
            truth[:, -1] = False
        else:
            truth = np.eye(len(names), dtype=bool)[random.integers(0, len(names), n)]
        open_ = np.random.default_rng([seed, 1]).random(truth.shape) < unknown
        labels = [
            None if i in unlabelled else np.flatnonzero(row).tolist()
            for i, row in enumerate(truth & ~open_)
        ]
        lacking = [np.flatnonzero(row).tolist() for row in open_]
        table = pa.table(
            {
                "id": [f"s{i}" for i in range(n)],
                "split": [("train", "train", "val", "test")[i % 4] for i in range(n)],
                "labels": pa.array(labels, pa.list_(pa.int32())),
                "unknown_labels": pa.array(lacking, pa.list_(pa.int32())),
                "text": [f"text {i}" for i in range(n)],
                "text_key": [f"t{i}" for i in range(n)],
                "image": [f"{i}.png" for i in range(n)],
                "image_key": [f"k{i}" for i in range(n)],
            }
        )
        recipe = {"spec": f"{name}.csv", "format": "csv", "label_separator": "|", **(source or {})}
        store = EmbeddingStore.create(
            tmp_path / name, table, label_set=names, task=task, source=recipe
        )
        image = random.normal(0, noise, (n, WIDTH))
        image[:, : len(names)] += np.where(truth, 1.0, -1.0)
        values = {
            "image": image.astype(np.float16),
            "text": random.normal(0, 1, (n, WIDTH)).astype(np.float16),
        }
        fill(store, values, failed, identity or {"backbone": "tiny", "weights": "abc"})
        return EmbeddingStore.open(tmp_path / name)

    return make


def fill(
    store: EmbeddingStore,
    values: dict[str, npt.NDArray[np.float16]],
    failed: tuple[int, ...],
    identity: dict[str, Any],
) -> None:
    """Write both towers of alias ``clip``."""
    fields = [
        FieldSpec(name=tower, shape=(WIDTH,), dtype="float16", tower=tower) for tower in values
    ]
    context = {"spec": "open_clip:tiny", "batch_size": 32}
    with store.writer(
        "clip", fields=fields, identity=identity, context=context, shard_rows=SHARD_ROWS
    ) as writer:
        for tower, array in values.items():
            for shard in range(writer.num_shards):
                start, stop = writer.bounds(shard)
                rows = np.array([r for r in range(start, stop) if r not in failed], dtype=np.int64)
                bad = {r: "cannot be read" for r in range(start, stop) if r in failed}
                writer.commit(shard, tower, rows, {tower: array[rows]}, failed=bad)


@pytest.fixture
def make_run() -> Callable[..., Any]:
    """Makes the run of a linear head that reads the labels off the image features."""

    def make(store: EmbeddingStore, **changes: Any) -> Any:
        import torch

        from mmc.heads.artifact import Run
        from mmc.heads.featureref import FeatureRef
        from mmc.heads.models.linear import Linear, LinearConfig
        from mmc.heads.thresholds import Thresholds

        c = len(store.label_set)
        head = Linear({"image": (WIDTH,)}, c, LinearConfig(normalize="none"))
        with torch.no_grad():
            head.classifier.weight.copy_(2 * torch.eye(WIDTH)[:c])
        settings: dict[str, Any] = {
            "head": "linear",
            "head_config": {"normalize": "none"},
            "loss": "bce",
            "loss_config": {},
            "features": {"image": FeatureRef.of(store, "clip/image")},
            "label_set": store.label_set,
            "task": store.task,
            "state": head.state_dict(),
            "thresholds": Thresholds.default(store.task, c),
            "source": store.sources[0],
        }
        return Run(**{**settings, **changes})

    return make
