"""A store's samples for other tools: one Parquet table, or NumPy arrays beside a table.

Embeddings, labels, the user's columns, a projection and a run's predictions, in the order of the
store, written block by block: what is held is the table of samples and one block of embeddings.

Legend: n samples, C labels, D values of a feature.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mmc.heads.artifact import Run
from mmc.heads.features import by_default
from mmc.heads.predict import Predictor, select_rows
from mmc.heads.projection import Method, Projection, project
from mmc.heads.temperature import probabilities
from mmc.heads.thresholds import decide
from mmc.store.errors import InputError, MmcError
from mmc.store.samples import COLUMNS, INTERNAL

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

Rows = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]

BLOCK_BYTES, LEAST_ROWS, MOST_ROWS = 64 << 20, 256, 65_536
"""Embeddings of a row group, as float32, and its rows."""
JOIN = ", "
"""Between the names in ``label`` and ``prediction``."""
METADATA = b"mmc"
THREADS = min(4, os.cpu_count() or 1)


class Pictures(Protocol):
    """What is known of the pictures of a store's rows."""

    def __call__(self, row: int) -> bytes:
        """A small JPEG; raises MmcError where there is none."""

    def path(self, row: int) -> str | None:
        """Absolute path of a picture that is a file of its own, else None."""


@dataclass(frozen=True, kw_only=True)
class HandoverReport:
    """What `export_samples` wrote."""

    path: Path
    rows: int
    columns: list[str]
    features: dict[str, str]
    """Feature -> its column or file."""
    projection: dict[str, Any] = field(default_factory=dict)
    without_features: int = 0
    """Samples that lack some feature: empty there."""
    without_thumbnail: int = 0

    def __str__(self) -> str:
        """What was written and what it holds."""
        lines = [f"{self.path}: {self.rows:,} samples"]
        lines += [f"  {feature}: {place}" for feature, place in self.features.items()]
        if self.projection:
            told = self.projection.get("explained")
            share = f", {told:.0%} of the variance" if told is not None else ""
            lines.append(
                f"  projection: {self.projection['method']} of {self.projection['feature']}{share}"
            )
        lines.append(f"  other columns: {', '.join(self.columns)}")
        if self.without_features:
            lines.append(f"  {self.without_features:,} samples lack a feature and are empty there")
        if self.without_thumbnail:
            lines.append(f"  {self.without_thumbnail:,} samples have no thumbnail")
        return "\n".join(lines)


def default_out(store: str, to: str) -> Path:
    """Where a store is exported to when nobody says: beside it, ``my.store`` -> ``my.parquet``."""
    if "://" in store:
        raise InputError(f"say with --out where {store} is exported to")
    path = Path(store).resolve()
    name = path.name.removesuffix(".store")
    return path.with_name(f"{name}.parquet" if to == "parquet" else f"{name}-arrays")


def export_samples(
    store: "EmbeddingStore",
    out: Path,
    to: Literal["parquet", "npy"],
    *,
    run: Run | None = None,
    features: Sequence[str] = (),
    split: str | None = None,
    projection: Method = "pca",
    pictures: Pictures | None = None,
    thumbnails: bool = False,
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
) -> HandoverReport:
    """Write samples and what is known of them to ``out``, whole or not at all.

    ``parquet`` is one file, replaced if it is there; ``npy`` a new folder with an array for each
    feature, ``projection``, ``labels`` (int8, -1 unknown), ``probabilities`` and samples.parquet.

    Args:
        run: whose predictions are added.
        features: ``alias/field`` or aliases; default: all that are one vector per sample.
        split: only samples of it.
        projection: of the first feature.
        pictures: where pictures are; None: as the store names them.
        thumbnails: add a small JPEG of each, as {bytes, path}.

    Raises:
        InputError: no samples or no such feature, an ``out`` that is taken, a run for other
            features or labels.
    """
    names = _features(store, features)
    rows = select_rows(store, None, None if split in (None, "all") else split)
    _check_out(out, to)
    source = _Source(store, rows, names, run, pictures, thumbnails, device)
    if projection != "none" and names:
        made = project(store[names[0]], rows, projection, progress=progress)
        source.projection = made
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        (_write_parquet if to == "parquet" else _write_arrays)(source, partial, progress)
        partial.replace(out)
    except OSError as error:
        raise MmcError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
    return source.report(out, to)


class _Source:
    """The columns of a store's rows, block by block."""

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
        own = [*COLUMNS.names, *INTERNAL.names]
        samples = store.samples
        self.user = samples.select([n for n in samples.column_names if n not in own])
        self.core = samples.select(["id", "split", "text", "image", "image_offset", "size"])
        made = {"label", "labels", "projection_x", "projection_y", *self.columns.values()}
        made |= {"predicted", "prediction", "confidence", "correct", "probabilities", "thumbnail"}
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
        labels = self._names(part)
        columns: dict[str, Any] = {
            "id": core["id"],
            "split": core["split"],
            "label": pa.array([None if x is None else JOIN.join(x) for x in labels], pa.string()),
            "labels": pa.array(labels, pa.list_(pa.string())),
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
        right = [
            None if t is None or g is None else set(t) == set(g)
            for t, g in zip(true, given, strict=True)
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

    def report(self, out: Path, to: str) -> HandoverReport:
        """What was written."""
        done = [self.features[name].done[self.rows] for name in self.names]
        lacking = int((~np.logical_and.reduce(done)).sum()) if done else 0
        other = self.table(slice(0, 0)).column_names
        if self.run is not None:
            other += ["prediction", "predicted", "confidence", "correct", "probabilities"]
        return HandoverReport(
            path=out,
            rows=len(self.rows),
            columns=other,
            features={n: c if to == "parquet" else f"{c}.npy" for n, c in self.columns.items()},
            projection=self.projection_record(),
            without_features=lacking,
            without_thumbnail=self.without_thumbnail,
        )

    def _names(self, part: slice) -> list[list[str] | None]:
        labels, names = self.store.labels, self.store.label_set
        found: list[list[str] | None] = []
        for row in self.rows[part].tolist():
            start, stop = labels.indptr[row], labels.indptr[row + 1]
            known = bool(labels.known[row])
            found.append([names[i] for i in labels.indices[start:stop]] if known else None)
        return found

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


def _write_parquet(source: _Source, path: Path, progress: Progress) -> None:
    """One row group for each block."""
    writer: pq.ParquetWriter | None = None
    try:
        for part in source.blocks():
            table, rows = source.table(part), source.rows[part]
            if source.run is not None:
                columns, p = source.predictions(part)
                for name, values in columns.items():
                    table = table.append_column(name, values)
                table = table.append_column("probabilities", _vectors(p, ~np.isnan(p[:, 0])))
            for name, feature in source.features.items():
                values = feature.take(rows, missing="fill", check=True)
                column = _vectors(values.astype(np.float32), feature.done[rows])
                table = table.append_column(source.columns[name], column)
            if writer is None:
                schema = table.schema.with_metadata(source.metadata())
                writer = pq.ParquetWriter(path, schema, compression="zstd")
            writer.write_table(table.cast(writer.schema), row_group_size=len(table))
            progress("export", part.stop, len(source.rows))
    finally:
        if writer is not None:
            writer.close()


def _vectors(values: npt.NDArray[np.float32], there: npt.NDArray[np.bool_]) -> pa.Array:
    """(n, ...) as fixed-size lists of the flattened values; null where not there."""
    width = int(np.prod(values.shape[1:]))
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, width, mask=pa.array(~there))


def _write_arrays(source: _Source, folder: Path, progress: Progress) -> None:
    """An .npy file for each array, and samples.parquet with everything else."""
    folder.mkdir()
    count, store = len(source.rows), source.store

    def new(name: str, dtype: Any, *shape: int) -> npt.NDArray[Any]:
        made: npt.NDArray[Any] = np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(count, *shape)
        )
        return made

    arrays = {
        name: new(source.columns[name], feature.dtype, *feature.shape[1:])
        for name, feature in source.features.items()
    }
    labels = new("labels", np.int8, len(store.label_set))
    p = new("probabilities", np.float32, len(source.run.label_set)) if source.run else None
    if source.projection is not None:
        np.save(folder / "projection.npy", source.projection.places)
    names = source.run.label_set if source.run else store.label_set
    (folder / "labels.txt").write_text("".join(f"{n}\n" for n in names), encoding="utf-8")
    writer: pq.ParquetWriter | None = None
    try:
        for part in source.blocks():
            table, rows = source.table(part), source.rows[part]
            for name, feature in source.features.items():
                arrays[name][part] = feature.take(rows, missing="fill", check=True)
            labels[part] = store.labels.multi_hot(rows)
            if p is not None:
                columns, p[part] = source.predictions(part)
                for name, values in columns.items():
                    table = table.append_column(name, values)
            if writer is None:
                schema = table.schema.with_metadata(source.metadata())
                writer = pq.ParquetWriter(folder / "samples.parquet", schema, compression="zstd")
            writer.write_table(table.cast(writer.schema), row_group_size=len(table))
            progress("export", part.stop, count)
    finally:
        if writer is not None:
            writer.close()
    for array in [*arrays.values(), labels, *([p] if p is not None else [])]:
        array.flush()  # type: ignore[attr-defined]


def _features(store: "EmbeddingStore", asked: Sequence[str]) -> list[str]:
    """Features to write: those asked for, an alias meaning all its pooled ones; else all pooled."""
    pooled = [name for name in store.features if by_default(store, name)]
    if not asked:
        return pooled
    found: list[str] = []
    for name in asked:
        inside = [p for p in pooled if p.split("/")[0] == name]
        found += inside or [store[name].name]
    return list(dict.fromkeys(found))


def _check_out(out: Path, to: str) -> None:
    if to == "parquet" and out.is_dir():
        raise InputError(f"{out} is a folder; name a file to write")
    if to == "npy" and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} is there already; name a new folder for the arrays")
