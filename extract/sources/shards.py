"""One tar of a WebDataset as a table of samples: which members make a sample, and what they say.

**Standard keys**, WebDataset's own rule: the key is the name up to the first dot of its last part,
the rest (lower case) is the kind: `a.b/000.seg.PNG` has key `a.b/000` and kind `seg.png`. Of a kind
with dots its last part counts where the sample has no member of just that kind. Samples are put
together by key, though their members may not be neighbours.

**Numbered keys**: where a tar holds `caption_<n>` or `metadata_<n>`, members are paired by number:
`image_<n>.jpg`, `caption_<n>.txt`, `metadata_<n>.json`.

Captions and metadata are read here, in one go with the headers beside them; pictures are not.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from mmc.extract.sources.encoding import decode_text
from mmc.extract.sources.tar import Tar

IMAGES = frozenset(("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff"))
IMAGES |= {"avif", "jp2", "ppm", "pgm"}
_KINDS = {
    **dict.fromkeys(IMAGES, "image"),
    **dict.fromkeys(("txt", "text", "caption"), "text"),
    **dict.fromkeys(("json", "jsn"), "json"),
    "cls": "cls",
}
_NUMBERED = re.compile(r"(image|caption|metadata)_(\d+)")
_ROLE_OF = {"image": "image", "caption": "text", "metadata": "json"}
_MOST_TEXT = 16 << 20
"""Bytes of a caption or of metadata; what is longer is neither."""

Found = tuple[str, str, str, int, int, bytes | None]
"""Folder (with its `/`), base, kind, offset, size, content unless it is a picture."""


@dataclass
class Tally:
    """What to say of a source: how often something was seen, and where first."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, where: str, count: int = 1) -> None:
        """Count something."""
        if count:
            self.counts[what] += count
            self.first.setdefault(what, where)

    def merge(self, other: "Tally") -> None:
        """Add what was seen in another tar, which comes later."""
        self.counts.update(other.counts)
        self.first = {**other.first, **self.first}


@dataclass
class Shard:
    """The samples of one tar."""

    table: pa.Table
    """key, image_offset, image_size, text, cls; then the metadata, each name after `json:`.
    All are null where the sample has no such thing."""
    tally: Tally
    problem: str | None
    """Why the tar could not be read to its end."""


@dataclass(slots=True)
class _Sample:
    image: tuple[int, int] | None = None
    text: str | None = None
    cls: str | None = None
    json: dict[str, Any] | None = None
    sure: frozenset[str] = frozenset()
    """What was named by a kind without dots."""


def read_shard(path: str, where: str, encoding: str | None = None) -> Shard:
    """The samples of a tar.

    Args:
        path: the tar.
        where: its name in messages.
        encoding: of captions; None = UTF-8, else cp1252.

    Raises:
        InputError: it cannot be read at all.
    """
    tally = Tally()
    with Tar(path) as tar:
        members = _members(tar, where, tally)
        for what, count in tar.skipped.items():
            tally.add(f"{what} among the members", where, count)
        problem = tar.problem
    numbered = any(_is_caption(base, kind) for _, base, kind, *_ in members)
    samples = _grouped(members, numbered, where, encoding, tally)
    return Shard(_table(samples), tally, problem)


def _members(tar: Tar, where: str, tally: Tally) -> list[Found]:
    members: list[Found] = []
    for name, offset, size in tar.members():
        folder, slash, file = name.rpartition("/")
        base, dot, kind = file.partition(".")
        if not base or not dot or "__MACOSX" in folder:
            tally.add("hidden", f"{where}: {name}")
            continue
        kind = kind.lower()
        role = _KINDS.get(kind) or _KINDS.get(kind.rpartition(".")[2])
        if role is None:
            tally.add("other", f"{where}: {name}")
            continue
        content = None
        if role != "image":
            if size > _MOST_TEXT:
                tally.add("too long", f"{where}: {name}")
                continue
            content = tar.read(offset, size)
        while folder.startswith("./"):
            folder = folder[2:]
        folder = "" if folder == "." else folder
        members.append((folder + slash if folder else "", base, kind, offset, size, content))
    return members


def _is_caption(base: str, kind: str) -> bool:
    match = _NUMBERED.fullmatch(base)
    return match is not None and match[1] != "image" and _KINDS.get(kind) == _ROLE_OF[match[1]]


def _grouped(
    members: list[Found], numbered: bool, where: str, encoding: str | None, tally: Tally
) -> dict[str, _Sample]:
    """The samples by key, in the order in which they begin."""
    samples: dict[str, _Sample] = {}
    last = ""
    for member in members:
        folder, base, kind, offset, size, content = member
        sure = kind in _KINDS
        role = _KINDS[kind if sure else kind.rpartition(".")[2]]
        if numbered:
            match = _NUMBERED.fullmatch(base)
            if match is None or not sure or _ROLE_OF[match[1]] != role:
                tally.add("unnumbered", _place(where, member))
                continue
            base = str(int(match[2])) if len(match[2]) < 4000 else match[2]
        key = folder + base
        sample = samples.get(key)
        if sample is None:
            sample = samples[key] = _Sample()
        elif key != last:
            tally.add("apart", _place(where, member))
        last = key
        had = getattr(sample, role)
        if had is not None:
            tally.add("repeated", _place(where, member))
            if role in sample.sure or not sure:
                continue  # else what has dots in its kind gives way
        if sure:
            sample.sure |= {role}
        if role == "image":
            sample.image = (offset, size)
        else:
            assert content is not None
            problem = _take(sample, role, content, encoding)
            if problem:
                tally.add(problem, _place(where, member))
    return samples


def _place(where: str, member: Found) -> str:
    return f"{where}: {member[0]}{member[1]}.{member[2]}"


def _take(sample: _Sample, role: str, content: bytes, encoding: str | None) -> str | None:
    """Put a caption, a class or metadata into its sample; what to tally, if anything."""
    if role == "json":
        sample.json = _object(content)
        return None if sample.json is not None else "bad JSON"
    text, guessed = decode_text(content, encoding)
    if role == "text":
        sample.text = text
    else:
        sample.cls = text.strip() or None
    return "encoding" if guessed else None


def _object(content: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _table(samples: dict[str, _Sample]) -> pa.Table:
    rows = samples.values()
    images = [sample.image for sample in rows]
    columns = {
        "key": pa.array(samples, pa.string()),
        "image_offset": pa.array([image and image[0] for image in images], pa.int64()),
        "image_size": pa.array([image and image[1] for image in images], pa.int64()),
        "text": pa.array([sample.text for sample in rows], pa.string()),
        "cls": pa.array([sample.cls for sample in rows], pa.string()),
    }
    objects = [sample.json or {} for sample in rows]
    for name in dict.fromkeys(name for one in objects for name in one):
        cells = [_cell(one.get(name)) for one in objects]
        columns[f"json:{_clean(name)}"] = pa.array(cells, pa.string())
    return pa.table(columns)


def _cell(value: Any) -> str | None:
    """A JSON value as text, as a line of JSON lines gives it; NaN is how pandas writes null."""
    if isinstance(value, str):
        return _clean(value)
    if value is None or value != value:
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | dict):
        return _clean(json.dumps(value, ensure_ascii=False))
    return str(value)


def _clean(text: str) -> str:
    """``text`` with U+FFFD for half surrogates, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
