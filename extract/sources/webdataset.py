"""WebDataset: tars of samples, read at random by offset.

A source is a tar, a folder with tars at any depth, a glob or a brace pattern. Tars are planned from
their headers (`shards.read_shard`); a picture is named by its tar, its offset and its size.

**Ids** are the tar's path below the source's folder, without `.tar`, and the key: `Drama/00000/12`.
So they are unique, though keys may begin again in each tar, and adding a tar changes none.
**Splits**: folders or tars named train, val, test (`train/00000.tar`, `val-00003.tar`), else a
`split` in the metadata. **Labels**: from the metadata; else from `.cls`; else, where tars lie in
two folders or more, the folder is the class. **Texts**: `.txt`, else a caption in the metadata.
Shards written by `mmc prepare` say id, split and labels in their metadata.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import natsort
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmc.extract.sources import columns, patterns
from mmc.extract.sources.base import Records, SourceOptions, listed
from mmc.extract.sources.prepared import MARK, know_labels, recipe_of, restore_types
from mmc.extract.sources.shards import Shard, Tally, read_shard
from mmc.extract.sources.splits import SPLITS, split_named, split_of_file
from mmc.store.errors import InputError
from mmc.store.samples import UNKNOWN

_SUFFIX = ".tar"
_PACKED = (".tgz", ".tbz", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_TABLES = (".csv", ".tsv", ".tab", ".psv", ".jsonl", ".ndjson", ".parquet", ".arrow")
_THREADS = 16
"""Tars read at once: more than cores, since a cold disk or a network is waited for."""
_LOOK = 1_000
"""So many names of a folder, and so many folders, tell whether there are tars."""
_SAID = 5
_OWN = ("id", "image", "image_offset", "size", "text", "split", "cls", "folder")


class WebDataset:
    """Format `webdataset`."""

    def recognises(self, spec: str) -> bool:
        """By suffix; a folder by the tars in it, unless it has tables named train, val or test."""
        if patterns.is_pattern(spec):
            return spec.lower().endswith((_SUFFIX, *_PACKED)) or any(
                os.path.isdir(path) and _has_tars(path) for path in patterns.matches(spec)[:_LOOK]
            )
        if os.path.isdir(spec):
            return _has_tars(spec) and not _has_split_tables(spec)
        return spec.lower().endswith((_SUFFIX, *_PACKED)) and os.path.isfile(spec)

    def read(self, spec: str, options: SourceOptions) -> Records:
        """All samples of all tars.

        Raises:
            InputError: no tar there, none that can be read, no sample in them.
        """
        root, tars = find_tars(spec)
        names = [os.path.relpath(tar, root).replace(os.sep, "/") for tar in tars]
        shards = _read_all(tars, names, options)
        table = pa.concat_tables([shard.table for shard in shards], promote_options="default")
        tally = Tally()
        for shard in shards:
            tally.merge(shard.tally)
        tar = np.repeat(np.arange(len(names)), [len(shard.table) for shard in shards])
        if f"json:{MARK}" in table.column_names and _all_digits(table["key"]):
            # Prepared: a key is the sample's place in the source that it was prepared from.
            order = np.argsort(table["key"].cast(pa.int64()).to_numpy(), kind="stable")
            table, tar = table.take(order), tar[order]
        source = _Source(table, names, tar)
        records = source.records(options, tally, os.path.basename(root) or root)
        records.folder = root
        if source.prepared:
            recipe = recipe_of(root) or recipe_of(os.path.dirname(root)) or {}
            know_labels(records, recipe, options)
            records.columns = restore_types(records.columns, recipe)
        records.warnings += _problems(names, shards) + list(_lines(tally, _WARNINGS))
        records.notes += list(_lines(tally, _NOTES))
        if os.path.isdir(spec) and not source.prepared:
            records.notes += _left_out(root, names)
        return records


@dataclass(frozen=True)
class _Source:
    """The samples of all tars and where each came from."""

    table: pa.Table
    tars: Sequence[str]
    """Paths below the root, with `/`."""
    tar: Any
    """(N,) int64: index into ``tars``."""

    @property
    def prepared(self) -> bool:
        """Whether `mmc prepare` wrote it."""
        return f"json:{MARK}" in self.table.column_names

    def records(self, options: SourceOptions, tally: Tally, where: str) -> Records:
        """The columns and what they mean."""
        cells, roles, notes = self._columns()
        table = pa.table(cells)
        keep = _useful(table, roles, options)
        for row in np.flatnonzero(~keep)[:1]:
            tally.add("nothing", self._place(row), int((~keep).sum()))
        if not keep.any():
            raise InputError(
                f"{where}: no sample has a picture or a text, in {len(self.tars)} tars such as"
                f" {self.tars[0]}"
            )
        rows = np.flatnonzero(keep)
        return Records(
            where=where,
            folder="",
            columns=table.filter(pa.array(keep)),
            lines=rows + 1,
            description="WebDataset",
            place=lambda row: self._place(rows[row]),
            roles=roles,
            ids_in_folder=not self.prepared,
            notes=[*self._notes(roles), *notes],
        )

    def _place(self, row: int) -> str:
        return f"{self.tars[self.tar[row]]}: {self.table['key'][int(row)].as_py()}"

    def _columns(self) -> tuple[dict[str, Any], dict[str, str], list[str]]:
        """Columns by name, the role of those that have one, and what to say of that."""
        table, tars = self.table, pa.array(self.tars, pa.string())
        has_image = pc.is_valid(table["image_offset"])
        image = pc.if_else(has_image, tars.take(pa.array(self.tar)), pa.scalar(None, pa.string()))
        own = {
            "id": self._ids(),
            "image": image,
            "image_offset": table["image_offset"],
            "size": table["image_size"],
        }
        roles = {"id": "id", "image": "image"}
        for name in ("text", "cls"):
            if table[name].null_count < len(table):
                own[name] = table[name]
        for name, values in (("split", self._splits()), ("folder", self._folders())):
            if values is not None and not self.prepared:
                own[name] = values
        metadata = {
            name.removeprefix("json:"): table[name]
            for name in table.column_names
            if name.startswith("json:")
        }
        if self.prepared:
            del metadata[MARK]
            metadata.pop("id", None)
            roles |= {name: name for name in ("split", "labels") if name in metadata}
            roles |= {"unknown": UNKNOWN.name} if UNKNOWN.name in metadata else {}
        for name, values in metadata.items():
            while name in own:
                name = f"user.{name}"
            own[name] = values
        if "text" in own:
            roles["text"] = "text"
        notes: list[str] = []
        if not self.prepared:
            roles |= _roles(own, [name for name in own if name not in _OWN], roles, notes)
        return own, roles, notes

    def _ids(self) -> pa.ChunkedArray:
        stems = pa.array([name[: -len(_SUFFIX)] for name in self.tars], pa.string())
        stem = pa.chunked_array([stems.take(pa.array(self.tar))])
        places = pc.binary_join_element_wise(stem, self.table["key"], "/")
        if self.prepared and "json:id" in self.table.column_names:
            return pc.coalesce(self.table["json:id"], places)
        return places

    def _splits(self) -> pa.ChunkedArray | None:
        return self._of_tars([_split(name) for name in self.tars])

    def _folders(self) -> pa.ChunkedArray | None:
        """The first folder that is no split and not above all; None where there are not two."""
        inner = [
            [part for part in name.split("/")[:-1] if split_named(part) is None]
            for name in self.tars
        ]
        above = 0
        while all(len(parts) > above for parts in inner) and len({p[above] for p in inner}) == 1:
            above += 1
        folders = [parts[above] if len(parts) > above else None for parts in inner]
        return self._of_tars(folders) if len(set(folders) - {None}) > 1 else None

    def _of_tars(self, values: Sequence[str | None]) -> pa.ChunkedArray | None:
        if not any(values):
            return None
        return pa.chunked_array([pa.array(values, pa.string()).take(pa.array(self.tar))])

    def _notes(self, roles: dict[str, str]) -> list[str]:
        notes = [f"{len(self.tars):,} tars"] if len(self.tars) > 1 else []
        if roles.get("labels") == "folder":
            folders = pc.unique(self._folders()).drop_null().to_pylist()
            notes.append(
                f"labels: from the tars' folders ({listed(natsort.natsorted(folders), 5)});"
                " --label-column - if they are no classes"
            )
        return notes


def _all_digits(keys: pa.ChunkedArray) -> bool:
    return bool(pc.all(pc.match_substring_regex(keys, "^[0-9]{1,18}$")).as_py())


def find_tars(spec: str) -> tuple[str, list[str]]:
    """The folder that a source's ids start from, and its tars: train before val before test.

    Raises:
        InputError: there is none, or it is packed.
    """
    if patterns.is_pattern(spec):
        root = patterns.fixed_folder(spec)
        found = []
        for path in patterns.expand(spec):
            found += list(_walk(path)) if os.path.isdir(path) else [path]
        found = [path for path in found if path.lower().endswith((_SUFFIX, *_PACKED))]
    else:
        path = os.path.abspath(os.path.expanduser(spec))
        found = list(_walk(path)) if os.path.isdir(path) else [path]
        root = path if os.path.isdir(path) else os.path.dirname(path)
    if not found:
        raise InputError(f"{spec} names no .tar")
    for path in found:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise InputError(f"the name of {path!r} is not UTF-8; rename it") from None
    packed = [path for path in found if path.lower().endswith(_PACKED)]
    if packed:
        raise InputError(
            f"{packed[0]} is packed, and samples cannot be read from the middle of that; unpack it"
            " first (gunzip, bunzip2, unxz, unzstd) and give the .tar"
        )
    order = {name: at for at, name in enumerate(SPLITS)}
    key = natsort.natsort_keygen()
    found.sort(
        key=lambda tar: (order.get(_split(os.path.relpath(tar, root)) or "", len(order)), key(tar))
    )
    return root, found


def _split(name: str) -> str | None:
    """The split that a tar's folders or its name say."""
    *folders, file = name.replace(os.sep, "/").split("/")
    return next(filter(None, map(split_named, folders)), None) or split_of_file(file)


def _walk(folder: str, most: int | None = None) -> Iterator[str]:
    """The tars below a folder, links followed once.

    With ``most``, only so many names of each folder and so many folders are looked at.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting and len(seen) != most:
        folder = waiting.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            with os.scandir(folder) as found:
                for at, entry in enumerate(found):
                    if at == most:
                        break
                    if entry.name.startswith(".") or entry.name == "__MACOSX":
                        continue
                    if entry.name.lower().endswith(_SUFFIX) and entry.is_file():
                        yield entry.path
                    elif entry.is_dir():
                        waiting.append(entry.path)
        except PermissionError:
            continue


def _has_tars(folder: str) -> bool:
    return any(True for _ in _walk(folder, _LOOK))


def _has_split_tables(folder: str) -> bool:
    return any(
        name.lower().removesuffix(".gz").endswith(_TABLES) and split_of_file(name)
        for name in os.listdir(folder)
    )


def _left_out(folder: str, tars: Sequence[str]) -> list[str]:
    """A note on tables beside the tars that do not belong to one of them, as img2dataset's do."""
    stems = {name.partition(".")[0] for name in tars}
    tables = [
        name
        for name in natsort.natsorted(os.listdir(folder))
        if name.lower().removesuffix(".gz").endswith(_TABLES)
        and name.partition(".")[0] not in stems
    ]
    if not tables:
        return []
    return [f"files left out: {listed(tables, 5)} (the tars are read; name a table to read it)"]


def _read_all(tars: Sequence[str], names: Sequence[str], options: SourceOptions) -> list[Shard]:
    """One shard for each tar; those that cannot be read are empty and have a problem.

    Raises:
        InputError: of the first tar, when no tar has a sample.
    """
    errors = []

    def read(tar: str, name: str) -> Shard:
        try:
            return read_shard(tar, name, options.encoding)
        except InputError as error:
            errors.append((name, error))
            return Shard(_EMPTY, Tally(), "it cannot be read")

    with ThreadPoolExecutor(max_workers=min(_THREADS, len(tars))) as pool:
        shards = list(pool.map(read, tars, names))
    if not any(len(shard.table) for shard in shards):
        if errors:
            raise min(errors, key=lambda one: names.index(one[0]))[1]
        where = tars[0] if len(tars) == 1 else f"{len(tars)} tars, such as {tars[0]}"
        problem = next((f" ({shard.problem})" for shard in shards if shard.problem), "")
        raise InputError(f"there are no samples in {where}{problem}")
    for name, error in errors:
        shards[names.index(name)].problem = str(error)
    return shards


_EMPTY = pa.table(
    {
        "key": pa.array([], pa.string()),
        "image_offset": pa.array([], pa.int64()),
        "image_size": pa.array([], pa.int64()),
        "text": pa.array([], pa.string()),
        "cls": pa.array([], pa.string()),
    }
)


def _roles(
    cells: dict[str, pa.ChunkedArray],
    metadata: Sequence[str],
    known: dict[str, str],
    notes: list[str],
) -> dict[str, str]:
    """The columns for text, labels and split, from the metadata's names where nothing else says."""
    roles = {"split": "split"} if "split" in cells else {}
    filled = [name for name in metadata if cells[name].null_count < len(cells[name])]
    for role in ("text", "labels", "split", "unknown"):
        name, others = columns.by_name(filled, role)
        if name is None or role in (*known, *roles):
            continue
        roles[role] = name
        if others:
            option = columns.option_of(role).replace("_", "-")
            notes.append(
                f"{role}: from {name!r} of the metadata, not {listed(others)}; choose with"
                f" --{option}"
            )
    for name in ("cls", "folder"):
        if "labels" not in roles and name in cells:
            roles["labels"] = name
    return roles


def _useful(table: pa.Table, roles: dict[str, str], options: SourceOptions) -> Any:
    """(N,) bool: samples that have a picture or a text."""
    useful = pc.is_valid(table["image"]).to_numpy()
    text = options.text_column or roles.get("text")
    if options.text_template is not None or (text and text not in table.column_names):
        return np.ones(len(table), bool)
    if text:
        filled = pc.greater(pc.binary_length(pc.utf8_trim_whitespace(table[text])), 0)
        useful |= pc.fill_null(filled, False).to_numpy()
    return useful


def _problems(names: Sequence[str], shards: Sequence[Shard]) -> list[str]:
    """A warning for each of the first tars that could not be read to their end."""
    bad = [(name, shard) for name, shard in zip(names, shards, strict=True) if shard.problem]
    lines = [
        f"{name}: {shard.problem}"
        if not len(shard.table)
        else f"{name}: {shard.problem}; used: {_counted(len(shard.table), 'sample')} before that"
        " (the last of them may lack parts)"
        for name, shard in bad[:_SAID]
    ]
    if len(bad) > _SAID:
        lines.append(f"{len(bad) - _SAID} more of {len(names)} tars are damaged like these")
    return lines


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


_NOTES = {
    "apart": "members of a sample are not all neighbours ({count} times, first {first}); put"
    " together by key, as WebDataset's own reader would not",
    "hidden": "members left out that are hidden or have no kind: {count}, first {first}",
    "other": "members left out that are no picture, text or metadata: {count}, first {first}",
}
_WARNINGS = {
    "repeated": "{count} members repeat what their sample already has and are left out, first"
    " {first}",
    "nothing": "{count} samples have neither a picture nor a text and are left out, first {first}",
    "unnumbered": "{count} members left out that are not image_, caption_ or metadata_ with a"
    " number, first {first}",
    "bad JSON": "{count} samples have metadata that is no JSON object, first {first}; they are used"
    " without it",
    "encoding": "{count} texts are not in UTF-8 (or the --encoding given), first {first}; read as"
    " cp1252, or with U+FFFD",
    "too long": "{count} texts or metadata of more than 16 MiB are left out, first {first}",
    "link among the members": "{count} links among the members are left out, first in {first}",
    "sparse file among the members": "{count} sparse files among the members are left out (they"
    " cannot be read by offset), first in {first}",
    "special file among the members": "{count} special files among the members are left out, first"
    " in {first}",
}


def _lines(tally: Tally, words: dict[str, str]) -> Iterator[str]:
    for what, line in words.items():
        if tally.counts[what]:
            first = tally.first[what]
            first = first if first.isprintable() else repr(first)
            yield line.format(count=f"{tally.counts[what]:,}", first=first)
