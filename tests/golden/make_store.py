"""Makes ``store-v1``, the store of format 1 that must open for ever: run it once per format.

    python tests/golden/make_store.py FOLDER

The numbers are simple enough to be written down in the test that reads them.
"""

import sys

import numpy as np
import pyarrow as pa

from mmc.store import EmbeddingStore, FieldSpec

SOURCE = {"spec": "pets.csv", "format": "csv", "columns": {"id": "ImageID", "labels": "Labels"}}
FIELDS = (
    FieldSpec(name="image", shape=(3,), dtype="float16", tower="image"),
    FieldSpec(name="text_tokens", shape=(2, 2), dtype="float32", tower="text"),
    FieldSpec(name="text_mask", shape=(2,), dtype="bool", tower="text"),
)


def samples(count: int) -> pa.Table:
    """Samples p0, p1, …"""
    numbers = range(count)
    return pa.table(
        {
            "id": [f"p{number}" for number in numbers],
            "split": ["train" if number < 6 else "val" for number in numbers],
            "labels": pa.array(
                [None if number == 5 else [number % 3] for number in numbers],
                pa.list_(pa.int32()),
            ),
            "text": [f"a picture of pet {number}" for number in numbers],
            "image": [f"data/{number}.jpg" for number in numbers],
            "image_key": [f"image-{number}" for number in numbers],
            "text_key": [f"text-{number}" for number in numbers],
            "age": [number / 2 for number in numbers],
        }
    )


def main(path: str) -> None:
    """Ten samples, of which p9 is gone and the picture of p4 failed; two shards and a bit."""
    arguments = {"label_set": ("1", "2", "10"), "task": "multiclass", "source": SOURCE}
    store = EmbeddingStore.create(path, samples(10), **arguments)
    for alias, compress in (("plain", None), ("packed", "zstd")):
        with store.writer(
            alias, FIELDS, {"made": "by hand"}, {"mmc": "0.1"}, 4, compress
        ) as writer:
            for shard in range(writer.num_shards):
                rows = np.arange(*writer.bounds(shard))
                good = rows[rows != 4]
                image = (good[:, None] + np.arange(3) / 8).astype("float16")
                failed = {4: "not an image"} if 4 in rows else {}
                writer.commit(shard, "image", good, {"image": image}, failed)
                tokens = (rows[:, None, None] * 10 + np.arange(4).reshape(2, 2)).astype("float32")
                mask = np.stack([rows >= 0, rows % 2 == 0], axis=1)
                writer.commit(shard, "text", rows, {"text_tokens": tokens, "text_mask": mask})
            writer.write_label_text(("1", "2", "10"), np.eye(3), "a photo of a {label}")
    store.sync(samples(9), **arguments)


if __name__ == "__main__":
    main(sys.argv[1])
