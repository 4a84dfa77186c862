"""Which column is the id, the image, the text, the labels, the split: by name, or as told."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmc.extract.sources.base import NO_COLUMN, SourceOptions, listed
from mmc.store.errors import InputError

ROLES = ("id", "image", "text", "labels", "split", "unknown")

# In order of preference; compared without case, spaces, `_`, `-` and `.`.
_KNOWN: dict[str, tuple[str, ...]] = {
    "id": (
        *("id", "sampleid", "uid", "uuid", "guid", "key", "imdbid", "tweetid", "itemid", "rowid"),
        *("imageid", "imgid"),
    ),
    "image": (
        *("image", "img", "imagepath", "imgpath", "imagefile", "imgfile", "imagename", "imgname"),
        *("imagefilename", "filename", "filepath", "file", "path", "picture", "photo"),
        *("imageid", "imgid"),
    ),
    "text": (
        *("text", "caption", "captions", "sentence", "overview", "description", "plot", "content"),
        *("body", "tweet", "tweettext", "review", "comment", "message", "summary", "title"),
    ),
    "labels": (
        *("labels", "label", "genres", "genre", "categories", "category", "classes", "class"),
        *("classname", "labelnames", "labelname", "targets", "target", "tags", "tag"),
    ),
    "split": ("split", "subset", "partition"),
    "unknown": ("unknownlabels",),
}
_OPTION = {
    "id": "id_column",
    "image": "image_column",
    "text": "text_column",
    "labels": "label_column",
    "split": "split_column",
    "unknown": "unknown_column",
}
_IMAGE_IDS = ("imageid", "imgid")


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The header name of each role; null = the table has no such column."""

    id: str | None = None
    image: str | None = None
    text: str | None = None
    labels: str | None = None
    split: str | None = None
    unknown: str | None = None
    """Labels that are not known of a sample whose others are, written as ``labels`` are."""
    label_columns: tuple[str, ...] = ()
    """One column for each label, in place of ``labels``."""
    sure_image: bool = False
    """The image column was named by the user, or by a header that can mean nothing else."""
    notes: tuple[str, ...] = field(default=())

    def header_names(self) -> dict[str, str | None]:
        """{role: header name}."""
        return {role: getattr(self, role) for role in ROLES}


def option_of(role: str) -> str:
    """The field of the options that names a role's column."""
    return _OPTION[role]


def plain(name: str) -> str:
    """A header name without case, spaces and punctuation between words."""
    return re.sub(r"[\s_.-]+", "", name.lower())


def find_column(names: Sequence[str], wanted: str) -> str | None:
    """The header called ``wanted``; without case and outer spaces when that is unambiguous."""
    if wanted in names:
        return wanted
    alike = [name for name in names if name.strip().lower() == wanted.strip().lower()]
    return alike[0] if len(alike) == 1 else None


def missing_column(where: str, wanted: str, names: Sequence[str], option: str) -> InputError:
    """The error for a column that is asked for and not there."""
    return InputError(
        f"{where} has no column {wanted!r} (--{option.replace('_', '-')}); it has: {listed(names)}"
    )


def recognise(
    names: Sequence[str],
    options: SourceOptions,
    where: str,
    given: Mapping[str, str] | None = None,
) -> Roles:
    """The role of each column of one table; columns named by ``options`` may be missing.

    Args:
        given: what a format knows of its columns; the options go before it, and nothing is guessed.

    Raises:
        InputError: neither an image nor a text column.
    """
    found: dict[str, str | None] = {}
    notes: list[str] = []
    for role in ROLES:
        asked = getattr(options, _OPTION[role])
        if asked == NO_COLUMN:
            found[role] = None
        elif asked is not None:
            found[role] = find_column(names, asked)
        elif given is not None:
            found[role] = given.get(role)
        else:
            found[role], others = by_name(names, role)
            if others:
                notes.append(
                    f"{role}: from column {found[role]!r}, not {listed(others)};"
                    f" choose with --{_OPTION[role].replace('_', '-')}"
                )
    if options.image_column is None and found["image"] is None and options.image_root is not None:
        # A folder of images was given, so something names them: the id, as in <imdbId>.jpg.
        found["image"] = found["id"]
    if found["labels"] is None and options.unknown_column is None:
        found["unknown"] = None
    image = found["image"]
    if image is None and found["text"] is None and options.text_template is None:
        for option in ("image_column", "text_column"):
            asked = getattr(options, option)
            if asked not in (None, NO_COLUMN):
                raise missing_column(where, asked, names, option)
        raise InputError(
            f"{where}: no column for images or texts among {listed(names)}; name them"
            " with --image-column and --text-column (is the header line missing?)"
        )
    sure = image is not None and (
        options.image_column is not None
        or options.image_root is not None
        or given is not None
        or plain(image) not in _IMAGE_IDS
    )
    chosen: tuple[str, ...] = ()
    if found["labels"] is None and means_several(options.label_column):
        others = [name for name in names if name not in found.values()]
        chosen = matching_columns(others, str(options.label_column))
    return Roles(**found, label_columns=chosen, sure_image=sure, notes=tuple(notes))


def means_several(label_column: str | None) -> bool:
    """Whether ``label_column`` names a column for each label, where it is no column itself."""
    return label_column is not None and (
        label_column.startswith("[") or "," in label_column or "*" in label_column
    )


def named_columns(text: str) -> list[str]:
    """The names and patterns of several label columns: with commas between them, or a JSON list.

    Raises:
        InputError: it cannot be read, or holds none.
    """
    names: Any = [name.strip() for name in text.split(",")]
    if text.strip().startswith("["):
        try:
            names = json.loads(text)
        except ValueError as error:
            raise InputError(f"label-column {text[:60]!r} is not JSON: {error}") from None
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InputError(
            f"cannot read label-column {text[:60]!r}; write names with commas between them, such"
            ' as toxic,obscene or tag_*, or a JSON list: ["a, b", "c"]'
        )
    return list(names)


def written_columns(names: Sequence[str]) -> str:
    """The value of ``label_column`` that means these columns."""
    if any(set(name) & set(",*[") or name != name.strip() for name in names):
        return json.dumps(list(names), ensure_ascii=False)
    return ",".join(names)


def matching_columns(names: Sequence[str], text: str) -> tuple[str, ...]:
    """Those of ``names``, in their order, that several label columns mean; `*` is any text."""
    found: set[str | None] = set()
    for wanted in named_columns(text):
        if "*" in wanted and wanted not in names:
            pattern = re.compile(".*".join(map(re.escape, wanted.split("*"))), re.DOTALL)
            found |= {name for name in names if pattern.fullmatch(name)}
        else:
            found |= {find_column(names, wanted)}
    return tuple(name for name in names if name in found)


def by_name(names: Sequence[str], role: str) -> tuple[str | None, list[str]]:
    """The preferred column and the others that would do; image ids are no rivals of anything."""
    known = _KNOWN[role]
    ranked = sorted(
        (name for name in names if plain(name) in known), key=lambda name: known.index(plain(name))
    )
    others = [name for name in ranked[1:] if plain(name) not in _IMAGE_IDS]
    return (ranked[0] if ranked else None), others


def check_asked(
    files: Sequence[tuple[str, Sequence[str]]], roles: Sequence[Roles], options: SourceOptions
) -> None:
    """Columns that the options name must exist: those of ids, images and texts in all files, the
    others in one.

    Args:
        files: (name for messages, header names) of each.

    Raises:
        InputError: a column is not there; the message lists those that are.
    """
    for role in ROLES:
        asked = getattr(options, _OPTION[role])
        if asked in (None, NO_COLUMN):
            continue
        lacking = [
            file for file, found in zip(files, roles, strict=True) if getattr(found, role) is None
        ]
        if role == "labels" and len(lacking) == len(roles) and means_several(asked):
            _check_label_columns(files[0], roles, asked)
            continue
        enough = not lacking if role in ("id", "image", "text") else len(lacking) < len(roles)
        if not enough:
            where, names = lacking[0]
            raise missing_column(where, asked, names, _OPTION[role])


def _check_label_columns(
    file: tuple[str, Sequence[str]], roles: Sequence[Roles], asked: str
) -> None:
    """Each column of a label must be in one file."""
    for wanted in named_columns(asked):
        if not any(matching_columns(one.label_columns, json.dumps([wanted])) for one in roles):
            where, names = file
            raise missing_column(where, wanted, names, _OPTION["labels"])
