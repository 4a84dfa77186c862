"""What `mmc prepare` leaves beside the data: the label set, and that nothing is to be guessed."""

import base64
import contextlib
import json
import os
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmc.extract.sources.base import Records, SourceOptions
from mmc.store.errors import InputError
from mmc.store.samples import UNKNOWN

MARK = "mmc.prepared"
"""Key in the metadata of a sample in a tar: its id, split and labels stand beside it."""
RECIPE = "prepare.json"

_COLUMNS = ("id", "image", "text", "labels", "split")


def recipe_of(folder: str) -> dict[str, Any] | None:
    """The recipe in a folder; None where there is none.

    Raises:
        InputError: it is damaged, or the folder is not finished.
    """
    path = os.path.join(folder, RECIPE)
    try:
        with open(path, encoding="utf-8") as file:
            recipe: dict[str, Any] = json.load(file)
        recipe["label_set"] = list(map(str, recipe["label_set"]))
        done = recipe["done"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error!r}); prepare the folder again") from None
    if not done:
        raise InputError(f"{folder} is half prepared; let `mmc prepare` finish it")
    return recipe


def schema_text(schema: pa.Schema) -> str:
    """The types of columns, for the recipe."""
    return base64.b64encode(schema.remove_metadata().serialize()).decode()


def know_labels(records: Records, recipe: dict[str, Any], options: SourceOptions) -> None:
    """Give records the labels of their recipe, unless others are asked for."""
    if options.label_column is None:
        records.label_set = tuple(recipe.get("label_set", ())) or None
        records.label_tree = recipe.get("label_tree")


def restore_types(columns: pa.Table, recipe: dict[str, Any]) -> pa.Table:
    """Columns that were written as text, in the types that the recipe knows.

    A column whose text does not fit its type (someone has edited it) stays text.
    """
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(recipe["columns"])))
    except (KeyError, ValueError, TypeError, pa.ArrowException):
        return columns
    for field in schema:
        at = columns.column_names.index(field.name) if field.name in columns.column_names else -1
        if at < 0 or columns.schema.field(at).type != pa.string() or field.type == pa.string():
            continue
        text = columns.column(at)
        text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
        with contextlib.suppress(pa.ArrowException, ValueError, TypeError):
            columns = columns.set_column(at, field.name, _typed(text, field.type))
    return columns


def _typed(text: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if not pa.types.is_nested(kind):
        return text.cast(kind)
    values = [None if cell is None else json.loads(cell) for cell in text.to_pylist()]
    return pa.chunked_array([pa.array(values, kind)])


def understand(records: Records, options: SourceOptions) -> None:
    """Give a prepared table its meaning: no column is guessed, an empty label cell is no label."""
    names = records.columns.column_names
    if records.roles is not None or tuple(names[: len(_COLUMNS)]) != _COLUMNS:
        return
    recipe = recipe_of(records.folder)
    if recipe is None or recipe.get("to") != "csv":
        return
    cells = records.columns["labels"]
    cells = pc.if_else(pc.equal(cells, ""), pa.scalar(None, pa.string()), cells)
    table = records.columns.set_column(names.index("labels"), "labels", cells)
    records.columns = restore_types(table, recipe)
    records.roles = {name: name for name in _COLUMNS}
    if UNKNOWN.name in names:
        records.roles = {**records.roles, "unknown": UNKNOWN.name}
    know_labels(records, recipe, options)
