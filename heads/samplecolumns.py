"""A store's samples as columns of a table, block by block: what `mmc.heads.handover` writes.

Legend: n samples, C labels.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmc.heads.artifact import Run
from mmc.heads.predict import Predictor
from mmc.heads.projection import Projection
from mmc.heads.temperature import probabilities
from mmc.heads.thresholds import decide
from mmc.store.errors import MmcError
from mmc.store.samples import COLUMNS, INTERNAL, UNKNOWN

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

Rows = npt.NDArray[np.int64]

BLOCK_BYTES, LEAST_ROWS, MOST_ROWS = 64 << 20, 256, 65_536
"""Embeddings of a block, as float32, and its rows."""
JOIN = ", "
"""Between the names in ``label`` and ``prediction``."""
METADATA = b"mmc"
THREADS = min(4, os.cpu_count() or 1)
PREDICTED = ("prediction", "predicted", "confidence", "correct", "probabilities")
MADE = ("label", "labels", UNKNOWN.name, "projection_x", "projection_y", "thumbnail", *PREDICTED)
"""Columns whose names a user's column cannot have."""


class Pictures(Protocol):
    """What is known of the pictures of a store's rows."""

    def __call__(self, row: int) -> bytes:
        """A small JPEG; raises MmcError where there is none."""

    def path(self, row: int) -> str | None:
        """Absolute path of a picture that is a file of its own, else None."""


class SampleColumns:
    """The columns of a store's rows; embeddings are the writer's."""

    def __init__(
        self,
        store: "EmbeddingStore",
        rows: Rows,
        names: list[str],
        run: Run | None,
        pictures: Pictures | None,
        thumbnails: bool,
        device: str,
    ) -> None:
        self.store, self.rows, self.names, self.run = store, rows, names, run
        self.features = {name: store[name] for name in names}
        self.pictures, self.thumbnails = pictures, thumbnails
        self.projection: Projection | None = None
        self.without_thumbnail = 0
        self.predictor = None
        if run is not None:
            run.check_labels(store.label_set, store.path)
            self.predictor = Predictor(run, store, device=device)
        own = [*COLUMNS.names, *INTERNAL.names, *([UNKNOWN.name] if store.labels.partly else [])]
        samples = store.samples
        self.user = samples.select([n for n in samples.column_names if n not in own])
        self.core = samples.select(["id", "split", "text", "image", "image_offset", "size"])
        made = {*MADE, *self.columns.values()}
        taken = [n if n not in made else f"user.{n}" for n in self.user.column_names]
        self.user = self.user.rename_columns(taken)

    @property
    def columns(self) -> dict[str, str]:
        """Feature -> column: ``clip/image`` is ``clip_image``."""
        return {name: name.replace("/", "_") for name in self.names}

    def blocks(self) -> Iterator[slice]:
        """Places in ``rows`` of each block."""
        width = sum(int(np.prod(f.shape[1:])) for f in self.features.values())
        width += len(self.run.label_set) if self.run else 0
        step = BLOCK_BYTES // (4 * max(width, 1))
        step = min(MOST_ROWS, max(LEAST_ROWS, step))
        for start in range(0, len(self.rows), step):
            yield slice(start, min(start + step, len(self.rows)))

    def metadata(self) -> dict[bytes, bytes]:
        """What a reader needs besides the columns, as JSON."""
        told: dict[str, Any] = {
            "store": self.store.path,
            "task": self.store.task,
            "label_set": list(self.store.label_set),
            "features": {
                name: {"column": self.columns[name], "fingerprint": feature.fingerprint}
                for name, feature in self.features.items()
            },
            "projection": self.projection_record(),
        }
        if self.run is not None:
            told["run"] = {
                "path": str(self.run.path),
                "head": self.run.head,
                "label_set": list(self.run.label_set),
                "thresholds": self.run.thresholds.to_json(),
            }
        return {METADATA: json.dumps(told, ensure_ascii=False).encode()}

    def projection_record(self) -> dict[str, Any]:
        made = self.projection
        if made is None:
            return {}
        return {"method": made.method, "feature": made.feature, "explained": made.explained}

    def table(self, part: slice) -> pa.Table:
        """Everything but embeddings and probabilities of a block."""
        taken = pa.array(self.rows[part])
        core = self.core.take(taken)
        labels, unknown = self._names(part), self._unknown(part)
        columns: dict[str, Any] = {
            "id": core["id"],
            "split": core["split"],
            "label": pa.array([None if x is None else JOIN.join(x) for x in labels], pa.string()),
            "labels": pa.array(labels, pa.list_(pa.string())),
            **({} if unknown is None else {UNKNOWN.name: pa.array(unknown, pa.list_(pa.string()))}),
            "text": core["text"],
            "image": self._images(part, core["image"]),
        }
        if self.core["image_offset"].null_count < len(self.core):
            columns |= {"image_offset": core["image_offset"], "image_size": core["size"]}
        user = self.user.take(taken)
        columns |= {name: user[name] for name in user.column_names}
        if self.projection is not None:
            for axis, name in enumerate(("projection_x", "projection_y")):
                values = self.projection.places[part, axis]
                columns[name] = pa.array(values, pa.float32(), from_pandas=True)
        if self.thumbnails:
            columns["thumbnail"] = self._thumbnails(part, core["id"])
        return pa.table(columns)

    def predictions(self, part: slice) -> tuple[dict[str, pa.Array], npt.NDArray[np.float32]]:
        """Columns of the run's answers, and its probabilities (n, C); NaN without features."""
        assert self.predictor is not None
        run, rows = self.predictor.run, self.rows[part]
        ok = self.predictor.done(rows)
        p = probabilities(self.predictor.logits(rows[ok]).cpu(), run.task, run.temperature)
        chosen = decide(p, run.task, run.thresholds)
        every = np.full((len(rows), len(run.label_set)), np.nan, np.float32)
        every[ok] = p.numpy()
        given: list[list[str] | None] = [None] * len(rows)
        for place, flags in zip(np.flatnonzero(ok).tolist(), chosen, strict=True):
            given[place] = [run.label_set[i] for i in flags.nonzero()[:, 0].tolist()]
        true = self._names(part)
        unknown = self._unknown(part) or [[]] * len(rows)
        right = [
            None if t is None or g is None else set(t) == set(g) - set(u)
            for t, g, u in zip(true, given, unknown, strict=True)
        ]
        best = np.full(len(rows), np.nan, np.float32)
        best[ok] = p.max(1).values.numpy() if len(p) else 0
        columns = {
            "prediction": pa.array([None if g is None else JOIN.join(g) for g in given]),
            "predicted": pa.array(given, pa.list_(pa.string())),
            "confidence": pa.array(best, pa.float32(), from_pandas=True),
            "correct": pa.array(right, pa.bool_()),
        }
        return columns, every

    def _names(self, part: slice) -> list[list[str] | None]:
        labels, names = self.store.labels, self.store.label_set
        found: list[list[str] | None] = []
        for row in self.rows[part].tolist():
            start, stop = labels.indptr[row], labels.indptr[row + 1]
            known = bool(labels.known[row])
            found.append([names[i] for i in labels.indices[start:stop]] if known else None)
        return found

    def _unknown(self, part: slice) -> list[list[str]] | None:
        """Names of single labels that are not known; None: the store knows rows as a whole."""
        labels, names = self.store.labels, self.store.label_set
        if not labels.partly:
            return None
        indptr, indices = labels.unknown(self.rows[part])
        cuts = zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True)
        return [[names[i] for i in indices[start:stop]] for start, stop in cuts]

    def _images(self, part: slice, named: pa.ChunkedArray) -> Any:
        if self.pictures is None:
            return named
        rows = self.rows[part].tolist()
        paths = [self.pictures.path(row) for row in rows]
        # A picture inside another file is named as the store does.
        kept = [p if p is not None else n for p, n in zip(paths, named.to_pylist(), strict=True)]
        return pa.array(kept, pa.string())

    def _thumbnails(self, part: slice, ids: pa.ChunkedArray) -> pa.Array:
        assert self.pictures is not None
        pictures = self.pictures

        def small(row: int) -> bytes | None:
            try:
                return pictures(row)
            except MmcError:
                return None

        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(small, self.rows[part].tolist()))
        self.without_thumbnail += sum(data is None for data in found)
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        values = [
            None if data is None else {"bytes": data, "path": f"{name}.jpg"}
            for data, name in zip(found, ids.to_pylist(), strict=True)
        ]
        return pa.array(values, kind)
