"""Tables with typed columns (Parquet, Arrow, data sets of Hugging Face) as records.

Columns keep their types. What `datasets` says of its columns is used where the file has it: class
labels become their names (-1, its mark of "no label", becomes null), and image columns are
pictures. Else a picture column is one of bytes that begin like a picture, alone or in a struct with
a path. A table with `image` and a number `image_offset` says itself where its pictures lie. One
picture column and no other bytes are kept: samples.parquet is no place for pictures.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmc.extract.sources import cells
from mmc.extract.sources.base import NO_COLUMN, Records, SourceOptions, listed, shown
from mmc.extract.sources.columns import ROLES, by_name, find_column, option_of
from mmc.store.errors import InputError

_SIGNATURES = (
    *(b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\x00", b"MM\x00*"),
    *(b"\x00\x00\x00\x0cjP", b"\x00\x00\x00\x1cftyp", b"\x00\x00\x00 ftyp"),
)
"""JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000, AVIF."""
_IMAGE, _OFFSET, _SIZE = "image", "image_offset", "size"

Features = Mapping[str, Any]
"""`datasets`' description of each column."""


@dataclass(frozen=True)
class Places:
    """Where the pictures of a column lie; everything is null where there is none."""

    image: pa.Array | pa.ChunkedArray
    """(N,) string: ``file``, ``file#column``, or a path that the column has."""
    offset: pa.Array | pa.ChunkedArray
    size: pa.Array | pa.ChunkedArray


class TypedFile(Protocol):
    """One file of a typed table."""

    path: str
    schema: pa.Schema
    num_rows: int

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Some columns; `a.b` is a field of a struct."""

    def first_bytes(self, column: str) -> bytes | None:
        """The first bytes in a column of pictures; None = there are none."""

    def places(self, column: str, name: str) -> Places:
        """The places of all pictures in a column of the file that samples call ``name``."""


@dataclass
class Columns:
    """What the columns of a table are."""

    pictures: list[str]
    bytes: list[str]
    """Other columns of bytes."""
    classes: dict[str, tuple[str, ...]]
    """The names of class labels, in columns of their numbers or of lists of them."""
    plain: list[str]
    """All the others, class labels included."""
    notes: list[str] = field(default_factory=list)


def read_records(
    files: Sequence[tuple[str | None, TypedFile]],
    options: SourceOptions,
    *,
    folder: str,
    description: str,
    features: Sequence[Features] | None = None,
) -> Records:
    """The records of the files of one table.

    Args:
        files: (split or None, file) of each.
        folder: that image paths start from; the files lie below it.
        features: of each file; None = what the files say themselves.

    Raises:
        InputError: no rows, or columns that differ too much.
    """
    split_column = "split" if any(split for split, _ in files) else None
    features = features or [features_of(file.schema) for _, file in files]
    known = [_columns(file, its) for (_, file), its in zip(files, features, strict=True)]
    picture = _picture_column(known, options)
    tables, classes = [], dict[str, tuple[str, ...]]()
    for (split, file), columns in zip(files, known, strict=True):
        for name, names in columns.classes.items():
            classes[name] = tuple(dict.fromkeys((*classes.get(name, ()), *names)))
        tables.append(_table(file, columns, picture, folder, split, split_column))
    table = _concatenated(tables)
    rows = [file.num_rows for _, file in files]
    if not len(table):
        raise InputError(f"{files[0][1].path} has no rows")
    roles, notes = _roles(table, picture, classes, split_column, options)
    table = _texts_joined(table, roles.get("text"), notes)
    placed = _ROW in table.column_names or _has_places(table)
    ids_are_rows = roles.get("id") == _ROW
    if ids_are_rows and "id" not in table.column_names:
        table = table.rename_columns({_ROW: "id"})
        roles["id"] = "id"
    elif not ids_are_rows and _ROW in table.column_names:
        table = table.drop_columns([_ROW])
    left = sorted({name for one in known for name in (*one.pictures, *one.bytes)} - {picture})
    if left:
        notes.append(f"columns of bytes left out: {listed(left)}")
    return Records(
        where=os.path.basename(files[0][1].path),
        folder=folder,
        columns=table,
        lines=np.concatenate([np.arange(1, count + 1) for count in rows]),
        description=description,
        place=_place([file.path for _, file in files], rows),
        roles=roles,
        label_set=classes.get(roles.get("labels", "")),
        has_places=placed,
        ids_in_folder=ids_are_rows and roles["id"] == "id",
        notes=notes,
    )


def features_of(schema: pa.Schema) -> Features:
    """What `datasets` has written of the columns into a file's own description."""
    try:
        written = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return written if isinstance(written, dict) else {}


def _place(paths: Sequence[str], rows: Sequence[int]) -> Callable[[int], str]:
    ends = np.cumsum(rows)

    def place(row: int) -> str:
        file = int(np.searchsorted(ends, row, side="right"))
        return f"{os.path.basename(paths[file])}:{row - int(ends[file]) + rows[file] + 1}"

    return place


def _columns(file: TypedFile, features: Features) -> Columns:
    found = Columns([], [], {}, [])
    for column in file.schema:
        feature = features.get(column.name)
        if _has_bytes(column.type):
            is_picture = isinstance(feature, dict) and feature.get("_type") == "Image"
            if not is_picture and feature is None:
                is_picture = (file.first_bytes(column.name) or b"").startswith(_SIGNATURES)
            (found.pictures if is_picture else found.bytes).append(column.name)
        elif not column.name.startswith("__index_level_"):  # pandas' unnamed index
            found.plain.append(column.name)
            names = _class_names(feature)
            if names:
                found.classes[column.name] = names
    return found


def _has_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_has_bytes(field.type) for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _has_bytes(kind.value_type)
    if pa.types.is_dictionary(kind):
        return _has_bytes(kind.value_type)
    tests = ("is_binary", "is_large_binary", "is_fixed_size_binary", "is_binary_view")
    return any(getattr(pa.types, test)(kind) for test in tests)


def _class_names(feature: Any) -> tuple[str, ...]:
    """The names of a class label, or of a list of them; none where a feature is something else."""
    if isinstance(feature, list) and len(feature) == 1:
        return _class_names(feature[0])
    if not isinstance(feature, dict):
        return ()
    if feature.get("_type") in ("Sequence", "List", "LargeList"):
        return _class_names(feature.get("feature"))
    if feature.get("_type") != "ClassLabel" or not feature.get("names"):
        return ()
    return tuple(str(name) for name in feature["names"])


def _picture_column(known: Sequence[Columns], options: SourceOptions) -> str | None:
    names = list(dict.fromkeys(name for one in known for name in one.pictures))
    if options.image_column is not None:
        return find_column(names, options.image_column)
    return by_name(names, "image")[0] or (names[0] if names else None)


def _table(
    file: TypedFile,
    columns: Columns,
    picture: str | None,
    folder: str,
    split: str | None,
    split_column: str | None,
) -> pa.Table:
    """The columns of one file: class labels by name, pictures by place."""
    plain = _plain_types(file.read(columns.plain))
    found = dict(zip(plain.column_names, plain.columns, strict=True))
    for name, names in columns.classes.items():
        found[name] = _named(found[name], names, f"{file.path}: {name}")
    if picture in columns.pictures:
        below = os.path.relpath(file.path, folder).replace(os.sep, "/")
        places = file.places(picture, below)
        found[picture] = places.image
        if places.offset.null_count < len(places.offset):
            found = {f"user.{n}" if n in (_OFFSET, _SIZE) else n: found[n] for n in found}
            rows = (f"{below}#{row}" for row in range(file.num_rows))
            found[_ROW] = pa.array(rows, pa.string())
            found |= {_OFFSET: places.offset, _SIZE: places.size}
    if split_column is not None:
        found[split_column] = pa.array([split] * file.num_rows, pa.string())
    return pa.table(found)


def _plain_types(table: pa.Table) -> pa.Table:
    """``table`` without types that only some readers know: extensions, dictionaries, views."""
    for at, column in enumerate(table.schema):
        kind, values = column.type, table[at]
        if isinstance(kind, pa.BaseExtensionType):
            values = pa.chunked_array([c.storage for c in values.chunks], kind.storage_type)
        elif pa.types.is_dictionary(kind):
            values = pc.cast(values, kind.value_type)
        elif pa.types.is_string_view(kind):
            values = pc.cast(values, pa.string())
        if values.type != kind:
            table = table.set_column(at, column.name, values)
    return table


_ROW = "__row__"
"""Column with `file#row`, the id where the table has none."""


def _named(column: pa.ChunkedArray, names: Sequence[str], where: str) -> pa.ChunkedArray:
    """Numbers of class labels, or lists of them, as names."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column
    is_list = not pa.types.is_integer(column.type)
    chunks = []
    for chunk in column.chunks:
        numbers = chunk.flatten() if is_list else chunk
        numbers = pc.if_else(pc.equal(numbers, -1), None, numbers)
        beyond = pc.any(pc.or_(pc.less(numbers, 0), pc.greater_equal(numbers, len(names)))).as_py()
        if beyond:
            raise InputError(f"{where} has a label number that none of its {len(names)} names has")
        words = pa.array(names, pa.string()).take(numbers)
        if is_list:
            lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False)
            offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
            words = pa.ListArray.from_arrays(offsets, words, mask=chunk.is_null())
        chunks.append(words)
    return pa.chunked_array(chunks, pa.list_(pa.string()) if is_list else pa.string())


def _concatenated(tables: Sequence[pa.Table]) -> pa.Table:
    names = dict.fromkeys(name for table in tables for name in table.column_names)
    columns = {}
    for name in names:
        parts = [
            table[name] if name in table.column_names else pa.chunked_array([pa.nulls(len(table))])
            for table in tables
        ]
        columns[name] = cells.joined(parts, f"column {shown(name)}")
    return pa.table(columns)


def _has_places(table: pa.Table) -> bool:
    """Whether a table says where in files its pictures lie: what `mmc caption` writes does."""
    wanted = {_IMAGE: pa.string(), _OFFSET: pa.int64()}
    return all(name in table.column_names for name in wanted) and all(
        table.schema.field(name).type == kind for name, kind in wanted.items()
    )


def _texts_joined(table: pa.Table, name: str | None, notes: list[str]) -> pa.Table:
    """``table`` with one text for each list of texts: several captions of one picture."""
    if name is None or not pa.types.is_list(table.schema.field(name).type):
        return table
    if not pa.types.is_string(table.schema.field(name).type.value_type):
        return table
    notes.append(f"text: the texts of each list in {name!r} are joined by spaces")
    column = pc.binary_join(table[name], " ")
    return table.set_column(table.column_names.index(name), name, column)


def _roles(
    table: pa.Table,
    picture: str | None,
    classes: Mapping[str, Sequence[str]],
    split_column: str | None,
    options: SourceOptions,
) -> tuple[dict[str, str], list[str]]:
    """The role of each column: what the table says of them, else by name."""
    notes: list[str] = []
    ours = (_OFFSET, _SIZE, _ROW) if _ROW in table.column_names or _has_places(table) else ()
    names = [name for name in table.column_names if name not in ours]
    roles: dict[str, str] = {}
    for role in ROLES:
        asked = getattr(options, option_of(role))
        if asked is not None:
            found = None if asked == NO_COLUMN else find_column(names, asked)
        elif role == "image" and picture is not None:
            found = picture
        elif role == "split" and split_column is not None:
            found = split_column
        else:
            found, others = by_name(names, role)
            if found is None and role == "labels" and classes:
                found, *others = classes
            if others:
                notes.append(
                    f"{role}: from column {found!r}, not {listed(others)};"
                    f" choose with --{option_of(role).replace('_', '-')}"
                )
        if found is not None:
            roles[role] = found
    if _ROW in table.column_names and "id" not in roles:
        roles["id"] = _ROW
        notes.append("ids: no id column, so a sample's file and row is its id")
    return roles, notes
