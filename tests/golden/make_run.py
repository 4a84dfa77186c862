"""Make ``run-v1``: a tiny run of run format 1, which every later mmc must still open.

Run it once per format, before its release; never to make a failing test pass:

    python tests/golden/make_run.py

It trains a router (two roles, so that most of the record is used) on a made-up store and writes
``run-v1/`` and ``run-v1.expected.json`` (inputs and the logits they gave) beside this file.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from mmc.heads.options import TrainConfig
from mmc.heads.trainer import train
from mmc.store import EmbeddingStore, FieldSpec

HERE = Path(__file__).parent
LABELS = ("cat", "dog, large", "été")
N, WIDTH = 48, 4


def make_store(path: Path) -> EmbeddingStore:
    """48 samples whose labels can be read off both features."""
    random = np.random.default_rng(1)
    truth = random.random((N, len(LABELS))) < 0.4
    table = pa.table(
        {
            "id": [f"sample {i}" for i in range(N)],
            "split": [("train", "train", "val", "test")[i % 4] for i in range(N)],
            "labels": pa.array([np.flatnonzero(t).tolist() for t in truth], pa.list_(pa.int32())),
            "text": ["a text"] * N,
            "text_key": [f"t{i}" for i in range(N)],
            "image": [f"{i}.png" for i in range(N)],
            "image_key": [f"i{i}" for i in range(N)],
        }
    )
    source = {
        "spec": "golden.csv",
        "format": "csv",
        "form": "table",
        "options": {},
        "columns": {"id": "id", "image": "image", "text": "text", "labels": "labels"},
        "label_separator": "|",
    }
    store = EmbeddingStore.create(path, table, label_set=LABELS, task="multilabel", source=source)
    fields = [
        FieldSpec(name=name, shape=(WIDTH,), dtype="float16", tower=name)
        for name in ("image", "text")
    ]
    identity = {"architecture": "golden", "weights": "0" * 64, "precision": "float32"}
    with store.writer("golden", fields=fields, identity=identity, context={"spec": "golden"}) as w:
        for field in fields:
            values = random.normal(0, 0.5, (N, WIDTH))
            values[:, : len(LABELS)] += truth
            for shard in range(w.num_shards):
                rows = np.arange(*w.bounds(shard))
                block = values[rows].astype(np.float16)
                w.commit(shard, field.tower, rows, {field.name: block})
    return EmbeddingStore.open(path)


def main() -> None:
    """Write the run and what it answers."""
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store")
        config = TrainConfig(
            head="router", epochs=3, device="cpu", precision="float32", overwrite=True
        )
        run = train(store, HERE / "run-v1", config).run
        rows = np.arange(8)
        inputs = {
            role: store[ref.feature].take(rows).astype(np.float32)
            for role, ref in run.features.items()
        }
    head = run.build_head()
    with torch.no_grad():
        logits = head({role: torch.from_numpy(values) for role, values in inputs.items()})
    expected = {
        "inputs": {role: values.tolist() for role, values in inputs.items()},
        "logits": logits.tolist(),
    }
    (HERE / "run-v1.expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
