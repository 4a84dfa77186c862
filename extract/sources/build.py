"""From the records of one or more files to the table of samples."""

import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmc.extract.sources import cells, columns, splits
from mmc.extract.sources.base import Part, Samples, SourceOptions, shown
from mmc.extract.sources.columns import Roles, written_columns
from mmc.extract.sources.duplicates import counts as counted
from mmc.extract.sources.ids import check_filled, check_unique, find_ids
from mmc.extract.sources.images import ImageColumn, Located, Where, locate_images
from mmc.extract.sources.label_columns import columns_of_zeros_and_ones, read_label_columns
from mmc.extract.sources.labels import Labels, missing_markers, read_labels, unlabelled
from mmc.extract.sources.merge import Rules, parse_merge
from mmc.extract.sources.texts import blank_to_null, text_of
from mmc.store.errors import InputError
from mmc.store.samples import UNKNOWN

RESERVED = frozenset(
    (
        *("id", "split", "labels", "text", "image", "image_offset"),
        *("image_key", "text_key", "size", "mtime_ns", "_source", "_gone", UNKNOWN.name),
    )
)
"""Columns of the samples table; a user's column of that name becomes ``user.<name>``."""


def build(spec: str, parts: Sequence[Part], options: SourceOptions) -> Samples:
    """Give the columns their meaning and join the parts.

    Raises:
        InputError: see the steps; the message names the file and line.
    """
    _tell_apart(parts)
    where = _Lines(parts)
    roles = [
        columns.recognise(
            part.records.columns.column_names, options, part.records.where, part.records.roles
        )
        for part in parts
    ]
    columns.check_asked(
        [(part.records.where, part.records.columns.column_names) for part in parts], roles, options
    )
    header = _header_names(roles)
    form = _form(parts[0].format, header)
    notes = [_format_line(parts, form, header, options.text_template)]
    notes += [note for part in parts for note in part.records.notes]
    notes += dict.fromkeys(note for role in roles for note in role.notes)

    text = _joined([text_of(part, role, options) for part, role in zip(parts, roles, strict=True)])
    images = _images(parts, roles, text, options)
    image = _joined(images.columns)
    ids = find_ids(parts, roles, image, notes)
    check_filled(ids, where)
    split = _splits(parts, roles)
    labels = _labels(parts, roles, split, options, where, form)
    unsplit = _says_no_split(split, parts)
    split = _default_split(split, labels, parts, options, notes)
    if options.split_by is not None:
        # Captions of one picture stay together where nothing but the picture names them.
        by = image if all(role.id is None for role in roles) and not image.null_count else ids
        split = _divided(split, by, labels, options.split_by, notes)
    core = {
        "id": ids,
        "split": pa.array(split, pa.string()),
        "labels": labels.column,
        "text": text,
        "image": image,
        "image_offset": _whole_numbers(parts, "image_offset"),
    }
    if labels.unknown is not None:
        core[UNKNOWN.name] = labels.unknown
    check_unique(core, where)
    if any(_is_format_column(part, "size") for part in parts):
        core["size"] = _whole_numbers(parts, "size")
    others = _other_columns(parts, roles, options)
    table = pa.table({**core, **others})
    counts = {**counted(table), "missing_images": images.missing}
    notes += [*images.notes, *labels.notes, *_count_lines(counts)]
    source = {
        "spec": spec,
        "format": parts[0].format,
        "form": form,
        "options": {
            field.name: getattr(options, field.name)
            for field in dataclasses.fields(options)
            if getattr(options, field.name) != field.default
        },
        "image_root": images.root,
        "columns": header,
        "label_separator": labels.separator,
        "label_tree": _label_tree(parts, labels.merged),
        "counts": counts,
    }
    return Samples(
        table=table,
        label_set=labels.names,
        task=labels.task,
        source=source,
        notes=notes,
        advice=[*_advice(counts, labels, options), *_label_advice(roles, others, options)],
        unsplit=unsplit and options.split_by is None,
        warnings=[
            *(warning for part in parts for warning in part.records.warnings),
            *images.warnings,
            *labels.warnings,
            *_without_effect(parts, options),
        ],
    )


def _without_effect(parts: Sequence[Part], options: SourceOptions) -> list[str]:
    """Options that this source has no use for: said, as predictions inherit them."""
    lines = []
    if options.label_level != "all" and all(part.records.label_tree is None for part in parts):
        lines.append(
            f"label level {options.label_level} has no effect: this source has no tree of labels"
        )
    if options.ties != "unlabelled" and not any(part.records.labels_merged for part in parts):
        lines.append(f"ties {options.ties} has no effect: this source has no annotators' votes")
    return lines


def _tell_apart(parts: Sequence[Part]) -> None:
    """Put the folder before the names of files that are called the same."""
    names = [part.records.where for part in parts]
    for part, name in zip(parts, names, strict=True):
        if names.count(name) > 1:
            part.records.where = os.path.join(os.path.basename(part.records.folder), name)


class _Lines:
    """`file:line` of a row of the joined table."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts

    def __call__(self, row: int) -> str:
        for part in self._parts:
            if row < len(part):
                return part.where(row)
            row -= len(part)
        raise IndexError(row)


def _joined(arrays: Sequence[pa.ChunkedArray]) -> pa.ChunkedArray:
    return pa.chunked_array([chunk for array in arrays for chunk in array.chunks], arrays[0].type)


def _header_names(roles: Sequence[Roles]) -> dict[str, str | None]:
    """The header name of each role, from the first table that has it."""
    found = {
        role: next((getattr(one, role) for one in roles if getattr(one, role)), None)
        for role in columns.ROLES
    }
    if found["unknown"] is None:
        del found["unknown"]
    return found


def _form(format_name: str, header: dict[str, str | None]) -> str:
    """Which well-known form the columns make: what `--format auto` of predictions goes by."""
    if format_name == "csv" and header["id"] and columns.plain(header["id"]) == "imageid":
        return "kaggle"
    if format_name == "jsonl" and (header["id"], header["image"]) == ("id", "img"):
        return "hateful-memes"
    return "table"


def _format_line(
    parts: Sequence[Part], form: str, header: dict[str, str | None], template: str | None
) -> str:
    kinds = dict.fromkeys(part.records.description for part in parts)
    named = {"kaggle": "Kaggle ", "hateful-memes": "hateful-memes "}.get(form, "")
    used: dict[str, list[str]] = {}
    for role, name in header.items():
        if role == "text" and template is not None:
            name = f"the template {template!r}"
        if name is not None:
            used.setdefault(name, []).append(role)
    columns_used = "; ".join(
        f"{' and '.join(roles)} from {name if 'text' in roles and template else shown(name)}"
        for name, roles in used.items()
    )
    return f"format: {named}{' and '.join(kinds)} ({columns_used})"


def _images(
    parts: Sequence[Part], roles: Sequence[Roles], text: pa.ChunkedArray, options: SourceOptions
) -> Located:
    given = [
        None
        if role.image is None
        else ImageColumn(
            values=blank_to_null(part.column(role.image)),
            folder=part.records.folder,
            sure=role.sure_image,
            where=part.where,
        )
        for part, role in zip(parts, roles, strict=True)
    ]
    has_text = text.null_count < len(text)
    return locate_images(given, [len(part) for part in parts], has_text, options)


def _splits(parts: Sequence[Part], roles: Sequence[Roles]) -> NDArray[np.object_]:
    """(N,) split names; "" where nothing is said."""
    result = []
    for part, role in zip(parts, roles, strict=True):
        if role.split is None:
            result.append(np.full(len(part), part.split or "", object))
            continue
        cells = part.column(role.split).combine_chunks().dictionary_encode()
        names = [splits.normalise(name) for name in cells.dictionary.to_pylist()] + [""]
        codes = pc.fill_null(cells.indices, -1).to_numpy()
        result.append(np.array(names, object)[codes])
    return np.concatenate(result)


def _labels(
    parts: Sequence[Part],
    roles: Sequence[Roles],
    split: NDArray[np.object_],
    options: SourceOptions,
    where: Where,
    form: str,
) -> Labels:
    if any(role.label_columns for role in roles):
        if any(role.labels is not None for role in roles):
            raise InputError(
                f"{options.label_column!r} is one column in a file and several in another; rename"
                " them alike"
            )
        if options.label_separator is not None:
            raise InputError("--label-separator has no meaning with a column for each label")
        return read_label_columns(
            parts,
            roles,
            task=options.task,
            missing=missing_markers(options.missing_labels),
            merge=_merge_rules(parts, options),
            need_merged=options.need_merged_labels,
        )
    if all(role.labels is None for role in roles):
        if options.task is not None:
            raise InputError(f"task {options.task} was asked for and the source has no labels")
        return unlabelled(len(split))
    written = _joined([part.column(role.labels) for part, role in zip(parts, roles, strict=True)])
    unknown = _joined([part.column(role.unknown) for part, role in zip(parts, roles, strict=True)])
    files = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    _, split_codes = np.unique(split.astype(str), return_inverse=True)
    return read_labels(
        written,
        split_codes * len(parts) + files,
        where=where,
        unknown=unknown if unknown.null_count < len(unknown) else None,
        separator=options.label_separator,
        task=options.task,
        missing=missing_markers(options.missing_labels),
        kaggle=form == "kaggle",
        label_set=_label_set(parts, roles),
        merge=_merge_rules(parts, options),
        need_merged=options.need_merged_labels,
    )


def _merge_rules(parts: Sequence[Part], options: SourceOptions) -> Rules:
    """Which labels to join, unless the formats have done so."""
    if all(part.records.labels_merged for part in parts):
        return ()
    return parse_merge(options.merge_labels or "")


def _label_set(parts: Sequence[Part], roles: Sequence[Roles]) -> tuple[str, ...] | None:
    """The labels that the formats of all parts with labels know of, in their order."""
    known: dict[str, None] = {}
    for part, role in zip(parts, roles, strict=True):
        if role.labels is None:
            continue
        records = part.records
        if records.label_set is None or role.labels != (records.roles or {}).get("labels"):
            return None
        known |= dict.fromkeys(records.label_set)
    return tuple(known)


def _label_tree(parts: Sequence[Part], merged: dict[str, str]) -> dict[str, list[str]] | None:
    """The trees of all parts as one, under the names that the labels have now."""
    trees = [part.records.label_tree for part in parts if part.records.label_tree is not None]
    if not trees:
        return None
    result: dict[str, dict[str, None]] = {}
    for tree in trees:
        for parent, children in tree.items():
            name = merged.get(parent, parent)
            below = (merged.get(child, child) for child in children)
            result.setdefault(name, {}).update({child: None for child in below if child != name})
    return {parent: list(children) for parent, children in result.items()}


def _named_split(parts: Sequence[Part]) -> str | None:
    """The split that the file's name says, of a single file."""
    name = os.path.basename(parts[0].records.where).partition(".")[0]
    return splits.split_named(name) if len(parts) == 1 else None


def _says_no_split(split: NDArray[np.object_], parts: Sequence[Part]) -> bool:
    return not (split != "").any() and _named_split(parts) is None


def _default_split(
    split: NDArray[np.object_],
    labels: Labels,
    parts: Sequence[Part],
    options: SourceOptions,
    notes: list[str],
) -> NDArray[np.object_]:
    if (split != "").any():
        return split
    if named := _named_split(parts):
        notes.append(f"split: all rows are {named}, after the file's name")
        return np.full(len(split), named, object)
    if options.split_by is not None:
        return split
    name = "train" if labels.names else "test"
    why = "has labels" if labels.names else "has no labels"
    notes.append(f"split: nothing says train, val or test, and it {why}: all rows are {name}")
    return np.full(len(split), name, object)


def _divided(
    split: NDArray[np.object_],
    names: pa.ChunkedArray,
    labels: Labels,
    split_by: str,
    notes: list[str],
) -> NDArray[np.object_]:
    """``split`` with the rows of train (and of no split) divided."""
    method, shares = splits.parse_split_by(split_by)
    rows = np.flatnonzero((split == "train") | (split == ""))
    take = pa.array(rows)
    if method == "hash":
        parts = splits.by_hash(names.take(take).to_pylist(), shares)
    else:
        parts = splits.stratified(
            [cell or [] for cell in labels.column.take(take).to_pylist()], shares
        )
    result = split.copy()
    result[rows] = np.array(splits.SPLITS, object)[parts]
    notes.append(f"split: {len(rows)} train rows divided by {split_by}")
    return result


def _whole_numbers(parts: Sequence[Part], name: str) -> pa.ChunkedArray:
    """An int64 column that a format may give; text columns of that name are the user's own."""
    return _joined(
        [
            part.records.columns[name]
            if _is_format_column(part, name)
            else pa.chunked_array([pa.nulls(len(part), pa.int64())])
            for part in parts
        ]
    )


def _is_format_column(part: Part, name: str) -> bool:
    table = part.records.columns
    return (
        part.records.has_places
        and name in ("image_offset", "size")
        and name in table.column_names
        and table.schema.field(name).type == pa.int64()
    )


def _other_columns(
    parts: Sequence[Part], roles: Sequence[Roles], options: SourceOptions
) -> dict[str, pa.ChunkedArray]:
    """The user's columns that have no role, null where a table lacks one."""
    wanted: dict[str, list[pa.ChunkedArray]] = {}
    for part, role in zip(parts, roles, strict=True):
        used = {name for key, name in role.header_names().items() if key != "text"}
        if options.text_template is None:
            used.add(role.text)
        used |= set(role.label_columns)
        for name in part.records.columns.column_names:
            if name not in used and not _is_format_column(part, name):
                wanted.setdefault(name, [])
    for name, arrays in wanted.items():
        arrays += [
            part.records.columns[name]
            if name in part.records.columns.column_names
            else pa.chunked_array([pa.nulls(len(part))])
            for part in parts
        ]
    return {
        f"user.{name}" if name in RESERVED else name: cells.joined(arrays, f"column {shown(name)}")
        for name, arrays in wanted.items()
    }


def _count_lines(counts: dict[str, Any]) -> list[str]:
    divided = ", ".join(
        f"{shown(name) or 'no split'} {count}" for name, count in counts["splits"].items()
    )
    return [
        f"{counts['samples']} samples ({divided}); {counts['images']} with an image,"
        f" {counts['texts']} with a text, {counts['labelled']} labelled"
    ]


def _label_advice(
    roles: Sequence[Roles], others: Mapping[str, pa.ChunkedArray], options: SourceOptions
) -> list[str]:
    """A table whose labels are a column each has none without the option: say which they may be."""
    if options.label_column is not None or any(role.labels is not None for role in roles):
        return []
    names = columns_of_zeros_and_ones(others)
    if not names:
        return []
    return [
        "no column of labels was recognised; if those of 0 and 1 are labels, add"
        f" --label-column {shlex.quote(written_columns(names))}"
    ]


def _advice(counts: dict[str, Any], labels: Labels, options: SourceOptions) -> list[str]:
    if options.split_by is not None or not labels.names or "val" in counts["splits"]:
        return []
    return [
        "no val split: mmc train-head holds out a tenth of train for it; "
        "--split-by hash:0.8,0.1,0.1 takes val and test from train for good"
    ]
