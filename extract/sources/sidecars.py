"""Pictures with a JSON file beside each, and one file of tags: the form of ADDS.

A picture ``x.jpg`` has ``x.json`` with ``{"encoded_labels": [1, 0, ...]}``, and the folder (or the
one above it) has ``organized_Tags.json`` with ``{"label": ["label below it", ...]}``. The order of
``encoded_labels`` is that of all names there, sorted, each once; -1 or null: not known. Pictures
may lie in folders; one that is called train, val or test gives the split.

A label counts as the file has it: a cat without its animal stays one, except at ``label_level``
top, where it makes an animal (that is unknown where a cat is unknown and nothing below animal is
there). Other keys of the JSON files become columns (one called like a text,
such as "caption", is the text), but for those named like a label: they say again what the labels
say.

A picture without a JSON file is unlabelled and a JSON file without picture is left out; both are
counted. A JSON file that cannot be read or has other labels than the tags is an error: labels would
be wrong without a sign of it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from mmc.extract.sources.base import Records, SourceOptions, listed, shown
from mmc.extract.sources.columns import by_name
from mmc.extract.sources.label_tree import Tree, at_level, tree_names
from mmc.extract.sources.splits import split_named
from mmc.store.errors import InputError
from mmc.store.samples import UNKNOWN

TAGS = "organized_Tags.json"
LABELS = "encoded_labels"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

_LOOKED_AT = 20
_OPEN = (-1, None)
"""What stands for a label that is not known."""


class Sidecars:
    """Format `sidecars`."""

    def recognises(self, spec: str) -> bool:
        """A folder with the file of tags, or with pictures whose JSON files hold encoded labels."""
        if not os.path.isdir(spec):
            return False
        return os.path.isfile(os.path.join(spec, TAGS)) or _has_sidecars(spec)

    def read(self, spec: str, options: SourceOptions) -> Records:
        """A record for each picture: image, split, labels and what else the JSON files hold.

        Raises:
            InputError: no tags or malformed ones, no picture, or a JSON file that is malformed.
        """
        folder = os.path.abspath(spec)
        tags = _tags_path(folder)
        tree, notes = read_tags(tags)
        names = tree_names(tree)
        level = at_level(tree, options.label_level, os.path.basename(tags))
        images, sidecars, unnamed = _files(folder, tags)
        if not images:
            raise InputError(f"{spec} holds no pictures ({', '.join(SUFFIXES)})")
        found = _read_all(folder, [os.path.splitext(image)[0] for image in images], sidecars, names)
        label_set = [
            name for name in names if name in {kept for up in level.values() for kept in up}
        ]
        notes.append(
            f"labels: {len(names)} names in {os.path.basename(tags)}, {len(tree)} of them with"
            f" labels below; level {options.label_level} has {len(label_set)}"
        )
        splits = pa.array([_split(image) for image in images], pa.string())
        others = _other_columns(found, {LABELS, *names}, notes)
        columns = {
            "image": pa.array(images, pa.string()),
            "split": splits,
            LABELS: pa.array([_cell(one, names, level) for one in found], pa.string()),
            **{f"user.{key}" if key in ("image", "split") else key: others[key] for key in others},
        }
        roles = {"image": "image", "labels": LABELS}
        unknown = [_unknown_cell(one, names, level) for one in found]
        if any(unknown):
            columns[UNKNOWN.name] = pa.array(unknown, pa.string())
            roles["unknown"] = UNKNOWN.name
        if splits.null_count < len(splits):
            roles["split"] = "split"
        else:
            del columns["split"]
        words = [key for key, values in others.items() if values.type == pa.string()]
        text, _ = by_name(words, "text")
        if text is not None:
            roles["text"] = text
        return Records(
            where=os.path.basename(folder),
            folder=folder,
            columns=pa.table(columns),
            lines=np.arange(1, len(images) + 1),
            description="pictures with JSON sidecars",
            place=lambda row: os.path.join(os.path.basename(folder), images[row]),
            roles=roles,
            label_set=tuple(label_set),
            label_tree={parent: list(children) for parent, children in tree.items()},
            notes=notes,
            warnings=_count_lines(images, sidecars, found, unnamed),
        )


def read_tags(path: str) -> tuple[Tree, list[str]]:
    """The tree in a file of tags, and what to say of it.

    Raises:
        InputError: not there, not JSON, or no object of lists of names.
    """
    name = os.path.basename(path)
    value = _load(path, name)
    if not isinstance(value, dict) or not value:
        raise InputError(f'{name} is no object of lists; write {{"label": ["label below", ...]}}')
    tree: dict[str, list[str]] = {}
    again = []
    for parent, children in value.items():
        if not isinstance(children, list) or not all(isinstance(one, str) for one in children):
            raise InputError(
                f"{name}: {shown(parent)} has {shown(json.dumps(children))}; give a list of the"
                ' names below it, such as ["cat", "dog"]'
            )
        tree[parent] = list(dict.fromkeys(children))
        if len(tree[parent]) < len(children):
            again.append(parent)
    empty = [one for one in tree_names(tree) if not one.strip()]
    if empty:
        raise InputError(f"{name}: a label has an empty name")
    notes = [f"{name}: repeated names below {listed(again)} count once"] if again else []
    return tree, notes


def _load(path: str, name: str) -> Any:
    """The value in a JSON file.

    Raises:
        InputError: it cannot be read or is no JSON.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not valid JSON ({error})") from None


def _tags_path(folder: str) -> str:
    for where in (folder, os.path.dirname(folder)):
        path = os.path.join(where, TAGS)
        if os.path.isfile(path):
            return path
    raise InputError(
        f"{folder} has JSON files with {LABELS} and no {TAGS}, which says what the labels are; put"
        " it there"
    )


def _has_sidecars(folder: str) -> bool:
    """Whether one of the first JSON files beside pictures holds encoded labels."""
    names = set(os.listdir(folder))
    pictures = sorted(name for name in names if name.lower().endswith(SUFFIXES))
    for name in pictures[:_LOOKED_AT]:
        sidecar = os.path.splitext(name)[0] + ".json"
        if sidecar in names:
            with open(os.path.join(folder, sidecar), "rb") as file:
                if f'"{LABELS}"'.encode() in file.read():
                    return True
    return False


def _files(folder: str, tags: str) -> tuple[list[str], set[str], int]:
    """Pictures, JSON files (without suffix) and the number of pictures whose names are no text."""
    images, sidecars, unnamed = [], set(), 0
    for path in _walk(folder):
        stem, suffix = os.path.splitext(path)
        if not path.isprintable() and not _encodable(path):
            unnamed += suffix.lower() in SUFFIXES
            continue
        if suffix.lower() in SUFFIXES:
            images.append(path)
        elif suffix == ".json" and os.path.join(folder, path) != tags:
            sidecars.add(stem)
    return sorted(images), sidecars, unnamed


def _encodable(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _walk(folder: str) -> Iterator[str]:
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(where, folder)
        for name in names:
            if not name.startswith("."):
                yield name if below == "." else os.path.join(below, name)


def _split(image: str) -> str | None:
    """The first folder on the picture's way that is called like a split."""
    named = (split_named(part) for part in image.split(os.sep)[:-1])
    return next((split for split in named if split), None)


def _read_all(
    folder: str, stems: list[str], sidecars: set[str], names: tuple[str, ...]
) -> list[dict[str, Any] | None]:
    """The object in each picture's JSON file, checked; None where there is none.

    Raises:
        InputError: some are malformed; the message has the first and how many there are.
    """
    result: list[dict[str, Any] | None] = []
    faults = []
    for stem in stems:
        if stem not in sidecars:
            result.append(None)
            continue
        try:
            value = _load(os.path.join(folder, f"{stem}.json"), f"{stem}.json")
            result.append(_checked(value, f"{stem}.json", names))
        except InputError as error:
            faults.append(str(error))
    if faults:
        more = f" ({len(faults)} JSON files are at fault)" if len(faults) > 1 else ""
        raise InputError(
            f"{faults[0]}; correct it, or remove it to read the picture without labels{more}"
        )
    return result


def _checked(value: Any, name: str, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict) or LABELS not in value:
        raise InputError(f'{name} has no "{LABELS}"')
    encoded = value[LABELS]
    if not isinstance(encoded, list):
        raise InputError(f"{name}: {LABELS} is no list")
    if len(encoded) != len(names):
        raise InputError(
            f"{name}: {LABELS} has {len(encoded)} values and {TAGS} has {len(names)} labels"
        )
    for at, one in enumerate(encoded):
        if isinstance(one, bool) or one not in (0, 1, *_OPEN):
            raise InputError(
                f"{name}: {LABELS} has {json.dumps(one)} at place {at + 1}, not 0, 1, or -1 for"
                " unknown"
            )
    return value


def _labels(
    one: Mapping[str, Any],
    names: tuple[str, ...],
    level: Mapping[str, tuple[str, ...]],
    values: tuple[Any, ...],
) -> list[str]:
    """The labels of a level that stand for a name with one of ``values``."""
    given = [name for name, value in zip(names, one[LABELS], strict=True) if value in values]
    return list(dict.fromkeys(label for name in given for label in level[name]))


def _cell(
    one: Mapping[str, Any] | None, names: tuple[str, ...], level: Mapping[str, tuple[str, ...]]
) -> str | None:
    """The labels as a JSON list."""
    return None if one is None else json.dumps(_labels(one, names, level, (1,)), ensure_ascii=False)


def _unknown_cell(
    one: Mapping[str, Any] | None, names: tuple[str, ...], level: Mapping[str, tuple[str, ...]]
) -> str | None:
    """The labels that are not known, as a JSON list; None where there are none."""
    if one is None:
        return None
    given = set(_labels(one, names, level, (1,)))
    left = [label for label in _labels(one, names, level, _OPEN) if label not in given]
    return json.dumps(left, ensure_ascii=False) if left else None


def _other_columns(
    found: list[dict[str, Any] | None], used: set[str], notes: list[str]
) -> dict[str, pa.Array]:
    """What else the JSON files hold: of one type where all values have it, else as JSON text."""
    keys = dict.fromkeys(key for one in found for key in one or ())
    columns = {}
    for key in keys:
        if key in used:
            continue
        values = [(one or {}).get(key) for one in found]
        try:
            columns[key] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            columns[key] = pa.array(
                [v if v is None or isinstance(v, str) else json.dumps(v) for v in values],
                pa.string(),
            )
    left = [key for key in keys if key in used and key != LABELS]
    if left:
        notes.append(
            f"keys of the JSON files that only repeat the labels left out: {listed(left, 5)}"
        )
    return columns


def _count_lines(
    images: list[str], sidecars: set[str], found: list[dict[str, Any] | None], unnamed: int
) -> list[str]:
    lines = []
    if unnamed:
        lines.append(
            f"{unnamed} pictures have names that are not UTF-8 and are left out; rename them"
        )
    bare = [image for image, one in zip(images, found, strict=True) if one is None]
    if bare:
        lines.append(
            f"{len(bare)} of {len(images)} pictures have no JSON file and are unlabelled, first"
            f" {shown(bare[0])}"
        )
    orphans = sorted(sidecars - {os.path.splitext(image)[0] for image in images})
    if orphans:
        lines.append(
            f"{len(orphans)} JSON files have no picture and are left out, first"
            f" {shown(orphans[0] + '.json')}"
        )
    return lines
