"""The table of a source with its captions, which `mmc extract` reads without any option.

Pictures below the table's folder are named relative to it. Others are reached through a link beside
the table, ``<table>.images``: paths in a table may not leave its folder, and links are for whoever
owns the folder to make. Pictures inside other files (tars, Parquet) keep their place in them, which
only a Parquet table can say.
"""

import codecs
import csv
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from mmc.extract.prepare_check import named_labels
from mmc.extract.sources import Samples, SourceOptions, read_source, resolve_image
from mmc.extract.sources.embedded import inside, table_of
from mmc.store.errors import InputError
from mmc.store.files import rename, sync_folder, write_temporary
from mmc.store.samples import UNKNOWN

SUFFIXES = (".csv", ".parquet")
COLUMNS = ("id", "split", "labels", "text", "image", "image_offset", "size", UNKNOWN.name)
UNLABELLED = "null"
"""A label cell of a CSV file for "not labelled", where the empty one means "none of them"."""


def check_out(out: Path, samples: Samples, column: str) -> None:
    """Raises InputError where the table cannot be written as asked."""
    table = samples.table
    if column in table.column_names or column in COLUMNS:
        raise InputError(f"the source has a column {column!r} already; name another with --column")
    spec = str(samples.source["spec"])
    for part in (Path(each.rpartition("=")[2]) for each in (spec, *spec.split(","))):
        if part == out:
            raise InputError(f"{out} is the source itself; name another file")
        if part.is_dir() and part in out.parents:
            # A table in a folder of pictures, or named train, would be read with it the next time.
            raise InputError(f"{out} would become part of the source {part}; name a file elsewhere")
    if out.suffix == ".csv" and table["image_offset"].null_count < len(table):
        raise InputError(
            f"the pictures of {spec} lie inside other files, and a CSV file cannot say where; "
            f"name a Parquet file: {out.with_suffix('.parquet')}"
        )
    _places(out, samples)


def write_table(
    out: Path, samples: Samples, captions: Sequence[str], column: str, report: Callable[[str], None]
) -> None:
    """Write the samples in the source's order, with ``captions`` as a column more.

    Args:
        out: a .csv or .parquet file.
        samples: the source.
        captions: (N,) "" = none.
        column: the new column's name.
        report: called with a line on what the user should know.

    Raises:
        InputError: something stands where a link to the pictures would.
    """
    table = samples.table
    columns: dict[str, Any] = {"id": table["id"]}
    if any(table["split"].to_pylist()):
        columns["split"] = table["split"]
    if samples.label_set:
        columns["labels"] = _label_names(samples)
    if UNKNOWN.name in table.column_names:
        columns[UNKNOWN.name] = _name_lists(table[UNKNOWN.name], samples.label_set)
    columns["text"] = table["text"]
    if table["image"].null_count < len(table):
        places = _places(out, samples)
        columns["image"] = pa.array(places.images, pa.string())
        if places.link is not None:
            _make_link(places.link, places.target)
            report(f"pictures are reached through the link {places.link}; move it with the table")
    if table["image_offset"].null_count < len(table):
        columns["image_offset"] = table["image_offset"]
        if "size" in table.column_names:
            columns["size"] = table["size"]
    columns[column] = pa.array(captions, pa.string())
    columns |= {name: table[name] for name in table.column_names if name not in COLUMNS}
    made = pa.table(columns)
    fill = _fill_csv(made) if out.suffix == ".csv" else _fill_parquet(made)
    temporary = out.with_name(f".{out.name}.tmp")
    write_temporary(temporary, fill)
    rename(temporary, out)
    sync_folder(out.parent)
    for line in _differences(out, samples):
        report(f"warning: {out}: {line}")


def _label_names(samples: Samples) -> pa.Array:
    """Lists of names, or one name where a sample has but one; null = unlabelled."""
    names = samples.label_set
    if samples.task == "multilabel":
        return _name_lists(samples.table["labels"], names)
    cells = samples.table["labels"].to_pylist()
    return pa.array([names[cell[0]] if cell else None for cell in cells], pa.string())


def _name_lists(labels: pa.ChunkedArray, names: Sequence[str]) -> pa.Array:
    lists = [None if cell is None else [names[at] for at in cell] for cell in labels.to_pylist()]
    return pa.array(lists, pa.list_(pa.string()))


@dataclass(frozen=True)
class _Places:
    """Where the pictures are, as seen from the table."""

    images: list[str | None]
    """Of each row."""
    link: Path | None
    """To make for that; None = they lie below the table's folder."""
    target: str


def _places(out: Path, samples: Samples) -> _Places:
    """Raises InputError where something else is in the way of a link."""
    cells = samples.table["image"].to_pylist()
    files: dict[str, tuple[str, str | None]] = {}
    for cell in dict.fromkeys(filter(None, cells)):
        file, column = table_of(cell)
        files[cell] = os.path.abspath(resolve_image(samples.source, file)), column
    folder = os.path.commonpath([os.path.dirname(file) for file, _ in files.values()])
    base, prefix, link = str(out.parent), "", None
    if os.path.commonpath([base, folder]) != base:
        root = samples.source["image_root"]
        base = root if os.path.commonpath([root, folder]) == root else folder
        link = out.with_name(f"{out.stem}.images")
        prefix = f"{link.name}/"
        ours = link.is_symlink() and os.readlink(link) == base
        if not ours and (link.is_symlink() or link.exists()):
            raise InputError(f"{link} is in the way of a link to {base}; move it away")
    found: dict[str, str] = {}
    for cell, (file, column) in files.items():
        path = prefix + Path(os.path.relpath(file, base)).as_posix()
        found[cell] = path if column is None else inside(path, column)
    return _Places([found[cell] if cell else None for cell in cells], link, base)


def _make_link(link: Path, target: str) -> None:
    if link.is_symlink():
        return  # to the same, as was looked at before
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError as error:
        raise InputError(
            f"the pictures are not below {link.parent}, and a link to them cannot be made "
            f"({error.strerror}); name an OUT in {target}"
        ) from None


def _fill_parquet(table: pa.Table) -> Callable[[BinaryIO], None]:
    return lambda file: pq.write_table(table, file)


def _fill_csv(table: pa.Table) -> Callable[[BinaryIO], None]:
    lists = [
        name == "labels" and pa.types.is_list(kind)
        for name, kind in zip(table.column_names, table.schema.types, strict=True)
    ]

    def fill(file: BinaryIO) -> None:
        writer = csv.writer(codecs.getwriter("utf-8")(file))
        writer.writerow(table.column_names)
        for batch in table.to_batches(max_chunksize=4096):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                cells = zip(row, lists, strict=True)
                writer.writerow(
                    UNLABELLED if value is None and is_list else _cell(value)
                    for value, is_list in cells
                )

    return fill


def _cell(value: Any) -> Any:
    """A value as a cell: lists and objects as JSON, nothing as the empty cell."""
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else value


def _differences(out: Path, samples: Samples) -> list[str]:
    """In what the table, read without options, is not the source: a loss is said, not found."""
    try:
        back = read_source(str(out), SourceOptions())
    except InputError as error:
        return [f"it cannot be read without options: {error}"]
    found = []
    if back.table["id"].to_pylist() != samples.table["id"].to_pylist():
        return [f"reading it gives {len(back.table)} samples, not these {len(samples.table)}"]
    if samples.label_set and back.task != samples.task:
        found.append(f"it reads as {back.task}; give --task {samples.task}")
    lost = [name for name in samples.label_set if name not in back.label_set]
    if lost:
        found.append(f"labels that no sample has are not in it, such as {lost[0]!r}")
    names = [named_labels(one.table, one.label_set) for one in (samples, back)]
    for what, one, other in (
        ("labels", *names),
        ("texts", *(each.table["text"].to_pylist() for each in (samples, back))),
        ("splits", *(each.table["split"].to_pylist() for each in (samples, back))),
    ):
        count = sum(a != b for a, b in zip(one, other, strict=True))
        if count:
            found.append(f"{count:,} samples have other {what} when it is read")
    return found
