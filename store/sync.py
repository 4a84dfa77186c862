"""Merging a source's table into a store's: who is new, changed, relabelled or gone."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from natsort import natsorted

from mmc.store.aliases import FEATURES, reset_changed
from mmc.store.errors import InputError
from mmc.store.files import Files
from mmc.store.locks import exclusive
from mmc.store.samples import (
    COLUMNS,
    INTERNAL,
    TASKS,
    UNKNOWN,
    Rows,
    SamplesFile,
    StoreMeta,
    csr,
    labels_column,
    settled,
    take_rows,
    with_internal,
    write_root,
    write_samples,
)
from mmc.store.schema import PARTLY

Mask = npt.NDArray[np.bool_]

_COMPARED = [name for name in COLUMNS.names if name != "id"]


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What a sync found, in rows; a row may count in several of the middle four."""

    added: int
    """New ids, and ids that had been gone."""
    changed_images: int
    """Image content differs: the image tower will run again."""
    changed_texts: int
    """Text content differs: the text tower will run again."""
    relabelled: int
    """Labels or split differ; nothing runs again for that."""
    gone: int
    """Rows of this source that are not in its table any more, newly marked."""
    unchanged: int
    """Rows of the table that count in none of the others."""
    label_set: tuple[str, ...]
    """The label set after the sync."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**asdict(self), "label_set": list(self.label_set)}


@dataclass(frozen=True, kw_only=True)
class Merge:
    """A merged table, and the rows whose content changed."""

    table: pa.Table
    meta: StoreMeta
    report: SyncReport
    changed: dict[str, Rows]
    """Content ("image", "text") to the rows of the old table where it changed."""


def sync_files(
    files: Files, table: pa.Table, asked: StoreMeta, replaces: str | None = None
) -> SyncReport:
    """Merge ``table`` (canonical) of the source that ``asked`` describes into a store's samples.

    With ``replaces`` it takes the place of the store's source of that spec.

    Raises:
        InputError: the merged rows do not fit the task.
        StoreLockedError: somebody writes.
    """
    with exclusive(files):
        for folder in ("", FEATURES):
            files.clean(folder, deep=False)
        current = SamplesFile(files)
        old = current.read()
        merged = merge(old, current.meta, table, asked, replaces)
        # First the statuses: a kill in between finds the same changes again next time.
        reset_changed(files, merged.changed, current.meta.generation)
        if merged.meta != current.meta or not merged.table.equals(old):
            write_samples(files, merged.table, merged.meta)
        write_root(files, merged.meta)
    return merged.report


def merge(
    old: pa.Table,
    old_meta: StoreMeta,
    new: pa.Table,
    new_meta: StoreMeta,
    replaces: str | None = None,
) -> Merge:
    """Merge ``new`` (canonical, of one source) into ``old`` by id.

    Rows keep their place; new ids are appended in the order of ``new``.

    Raises:
        InputError: the merged rows do not fit the task (several labels where one is allowed).
    """
    meta, source = _merged_meta(old_meta, new_meta, replaces)
    if UNKNOWN.name in old.column_names and old_meta.format < PARTLY:
        # A column that the user called so before it had a meaning.
        names = [f"user.{n}" if n == UNKNOWN.name else n for n in old.column_names]
        old = old.rename_columns(names)
    old, lost = _relabelled_for(old, old_meta, meta)
    new, _ = _relabelled_for(new, new_meta, meta)

    position = pc.index_in(old.column("id"), value_set=new.column("id"))
    matched = pc.is_valid(position).to_numpy()
    here = np.flatnonzero(matched)
    there = pc.drop_null(position).to_numpy().astype(np.int64)
    fresh_mask = np.ones(len(new), bool)
    fresh_mask[there] = False
    fresh = np.flatnonzero(fresh_mask)

    was_gone = old.column("_gone").to_numpy()
    old_source = old.column("_source").to_numpy()
    left = (old_source == source) & ~matched & ~was_gone

    before, after = take_rows(_compared(old), here), take_rows(_compared(new), there)
    images = _image_changed(before, after)
    texts = _text_changed(before, after)
    labels = _labels_changed(before, after) | lost[here]
    returned = was_gone[here]
    touched = images | texts | labels | returned

    take = np.arange(len(old))
    take[here] = len(old) + there
    take = np.concatenate([take, len(old) + fresh])
    size = len(take)
    gone = np.zeros(size, bool)
    gone[: len(old)] = (was_gone & ~matched) | left
    owner = np.full(size, source, np.int16)
    owner[: len(old)] = np.where(matched, source, old_source)
    table = with_internal(take_rows(_stacked(old, new), take), owner, gone)
    table, meta = settled(_without_dead_columns(table, new), meta)
    _check_task(table, gone, meta)
    report = SyncReport(
        added=len(fresh) + int(returned.sum()),
        changed_images=int(images.sum()),
        changed_texts=int(texts.sum()),
        relabelled=int(labels.sum()),
        gone=int(left.sum()),
        unchanged=int((~touched).sum()),
        label_set=meta.label_set,
    )
    changed = {"image": here[images], "text": here[texts]}
    return Merge(table=table, meta=meta, report=report, changed=changed)


def merged_tree(sources: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Parent label -> children over all recipes with a ``label_tree``, in the order met."""
    tree: dict[str, list[str]] = {}
    for source in sources:
        for parent, children in (source.get("label_tree") or {}).items():
            known = tree.setdefault(parent, [])
            known += [child for child in dict.fromkeys(children) if child not in known]
    return tree


def _merged_meta(old: StoreMeta, new: StoreMeta, replaces: str | None) -> tuple[StoreMeta, int]:
    """The description after the merge, and the index of the source in it."""
    recipe = new.sources[0]
    specs = [source["spec"] for source in old.sources]
    sources = list(old.sources)
    spec = recipe["spec"] if recipe["spec"] in specs else replaces
    if spec in specs:
        index = specs.index(spec)
        sources[index] = recipe
    else:
        index = len(sources)
        sources.append(recipe)
    if len(sources) == 1:
        # The only source of a store decides its labels: a name that it has dropped is gone.
        label_set = new.label_set
    elif not old.label_set or set(new.label_set) <= set(old.label_set):
        label_set = old.label_set or new.label_set
    else:
        label_set = tuple(natsorted(set(old.label_set) | set(new.label_set)))
    # The only source of a store decides its task; further ones can only widen it.
    task = new.task if len(sources) == 1 else max(old.task, new.task, key=TASKS.index)
    if task == "binary" and len(label_set) > 2:
        task = "multiclass"
    return (
        StoreMeta(
            label_set=label_set, task=task, sources=tuple(sources), generation=old.generation
        ),
        index,
    )


def _relabelled_for(table: pa.Table, meta: StoreMeta, merged: StoreMeta) -> tuple[pa.Table, Mask]:
    """``table`` with its label indices pointing into the merged label set; rows that lost labels.

    Labels that are not in it are dropped: only rows that are gone, or replaced, have them.
    """
    lost = np.zeros(len(table), bool)
    if meta.label_set == merged.label_set:
        return table, lost
    index = {label: position for position, label in enumerate(merged.label_set)}
    lookup = np.array([index.get(label, -1) for label in meta.label_set], np.int32)
    for name in ("labels", UNKNOWN.name):
        if name not in table.column_names:
            continue
        indptr, indices, known = csr(table.column(name))
        row = np.repeat(np.arange(len(table)), np.diff(indptr))
        indices = lookup[indices] if len(indices) else indices
        lost[row[indices < 0]] = True
        row, indices = row[indices >= 0], indices[indices >= 0]
        counts = np.bincount(row, minlength=len(table))
        # Both orders are natural nearly always; where one is not, keep rows ascending.
        indices = indices[np.lexsort((indices, row))]
        column = labels_column(counts, indices, known if name == "labels" else counts > 0)
        table = table.set_column(table.column_names.index(name), name, column)
    return table, lost


def _compared(table: pa.Table) -> pa.Table:
    """The columns that tell what changed."""
    names = [*_COMPARED, UNKNOWN.name]
    return table.select([name for name in names if name in table.column_names])


def _differs(before: pa.Table, after: pa.Table, name: str) -> Mask:
    """Rows where a column differs; null equals null."""
    left, right = before.column(name), after.column(name)
    unequal = pc.fill_null(pc.not_equal(left, right), False)
    only_one = pc.xor(pc.is_null(left), pc.is_null(right))
    result: Mask = pc.or_(unequal, only_one).to_numpy()
    return result


def _no_key(before: pa.Table, after: pa.Table, name: str) -> Mask:
    """Rows that have a content hash neither before nor after: their origin must decide."""
    result: Mask = pc.and_(
        pc.is_null(before.column(name)), pc.is_null(after.column(name))
    ).to_numpy()
    return result


def _image_changed(before: pa.Table, after: pa.Table) -> Mask:
    origin = np.zeros(len(before), bool)
    for name in ("image", "image_offset", "size", "mtime_ns"):
        origin |= _differs(before, after, name)
    key = "image_key"
    return _differs(before, after, key) | (origin & _no_key(before, after, key))


def _text_changed(before: pa.Table, after: pa.Table) -> Mask:
    key = "text_key"
    origin = _differs(before, after, "text") & _no_key(before, after, key)
    return _differs(before, after, key) | origin


def _labels_changed(before: pa.Table, after: pa.Table) -> Mask:
    """Rows whose labels, known or not (ascending in both tables), or split differ."""
    changed = _lists_differ(before.column("labels"), after.column("labels"))
    if UNKNOWN.name in before.column_names or UNKNOWN.name in after.column_names:
        changed |= _lists_differ(_unknown(before), _unknown(after))
    return changed | _differs(before, after, "split")


def _unknown(table: pa.Table) -> pa.ChunkedArray:
    if UNKNOWN.name in table.column_names:
        return table.column(UNKNOWN.name)
    return pa.chunked_array([pa.nulls(len(table), UNKNOWN.type)])


def _lists_differ(before: pa.ChunkedArray, after: pa.ChunkedArray) -> Mask:
    left_ptr, left, left_known = csr(before)
    right_ptr, right, right_known = csr(after)
    counts = np.diff(left_ptr)
    same_length = counts == np.diff(right_ptr)
    changed: Mask = ~same_length | (left_known != right_known)
    row = np.repeat(np.arange(len(counts)), counts)
    comparable = same_length[row]
    row, left = row[comparable], left[comparable]
    right = right[np.repeat(same_length, np.diff(right_ptr))]
    changed[row[left != right]] = True
    return changed


def _stacked(old: pa.Table, new: pa.Table) -> pa.Table:
    """Both tables, one under the other; a column whose types disagree becomes text."""
    try:
        return pa.concat_tables([old, new], promote_options="permissive")
    except pa.ArrowTypeError:
        pass
    for name in set(old.column_names) & set(new.column_names):
        if old.schema.field(name).type != new.schema.field(name).type:
            old, new = _as_text(old, name), _as_text(new, name)
    return pa.concat_tables([old, new], promote_options="permissive")


def _as_text(table: pa.Table, name: str) -> pa.Table:
    try:
        column = table.column(name).cast(pa.string())
    except pa.ArrowNotImplementedError:
        kind = table.schema.field(name).type
        raise InputError(
            f"column {name!r} has another type than in the store, and {kind} cannot become text; "
            "rename it"
        ) from None
    return table.set_column(table.column_names.index(name), name, column)


def _without_dead_columns(table: pa.Table, new: pa.Table) -> pa.Table:
    """Drop the user's columns that the source no longer has and no other row fills."""
    dead = [
        name
        for name in table.column_names
        if name not in new.column_names
        and name not in INTERNAL.names
        and table.column(name).null_count == len(table)
    ]
    return table.drop_columns(dead) if dead and len(table) else table


def _check_task(table: pa.Table, gone: Mask, meta: StoreMeta) -> None:
    if meta.task not in ("binary", "multiclass"):
        return
    several = (np.diff(csr(table.column("labels"))[0]) > 1) & ~gone
    if several.any():
        name = table.column("id")[int(several.argmax())].as_py()
        raise InputError(
            f"sample {name!r} has several labels and the task is {meta.task}; "
            "a multilabel task allows that"
        )
