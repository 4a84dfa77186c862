"""A store's samples for other tools: one Parquet table, or NumPy arrays beside a table.

Embeddings, labels, the user's columns, a projection and a run's predictions, in the order of the
store, written block by block: what is held is the table of samples and one block of embeddings.

Legend: n samples, C labels, D values of a feature.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mmc.heads.artifact import Run
from mmc.heads.features import by_default
from mmc.heads.predict import select_rows
from mmc.heads.projection import Method, project
from mmc.heads.samplecolumns import PREDICTED, Pictures, SampleColumns
from mmc.store.errors import InputError, MmcError

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

Rows = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]


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
    source = SampleColumns(store, rows, names, run, pictures, thumbnails, device)
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
    return _report(source, out, to)


def _report(source: SampleColumns, out: Path, to: str) -> HandoverReport:
    """What was written."""
    done = [source.features[name].done[source.rows] for name in source.names]
    lacking = int((~np.logical_and.reduce(done)).sum()) if done else 0
    other = source.table(slice(0, 0)).column_names
    if source.run is not None:
        other += PREDICTED
    return HandoverReport(
        path=out,
        rows=len(source.rows),
        columns=other,
        features={n: c if to == "parquet" else f"{c}.npy" for n, c in source.columns.items()},
        projection=source.projection_record(),
        without_features=lacking,
        without_thumbnail=source.without_thumbnail,
    )


def _write_parquet(source: SampleColumns, path: Path, progress: Progress) -> None:
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


def _write_arrays(source: SampleColumns, folder: Path, progress: Progress) -> None:
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
