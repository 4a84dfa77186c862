"""Format 1: names, fields, provenance and its hash. FORMAT.md says the same in words."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from mmc.store.errors import DamagedStoreError, FormatVersionError, InputError

FORMAT = 1
PARTLY = 2
"""The format that samples.parquet and the root group claim where single labels are unknown: readers
that know only format 1 would take those for "no", and so refuse the store."""

MISSING, DONE, FAILED = 0, 1, 2
"""The values of a status array: never committed, committed, tried and failed."""

TOWER_CONTENT: Mapping[str, tuple[str, ...]] = {
    "image": ("image",),
    "text": ("text",),
    "fused": ("image", "text"),
}
"""What each tower reads of a sample: a change of that content makes its rows missing again."""

Compression = Literal["zstd"] | None

_INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_DTYPES = _INTEGERS | {"bool", "float16", "float32", "float64"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+=-]*")
_RESERVED_FIELDS = ("label_text", "errors.parquet", "zarr.json")


def check_name(name: str, kind: str) -> str:
    """``name`` when it can be a folder of the store.

    Raises:
        InputError: it is empty or holds a character that paths or URLs give a meaning.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{kind} {name!r} cannot name a folder; use letters, digits and . _ @ + = - "
            "(the first one a letter or digit)"
        )
    return name


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """One array that a backbone gives per sample."""

    name: str
    """Name of the array, such as ``image`` or ``text_tokens``."""
    shape: tuple[int, ...]
    """Shape per sample; () for one number."""
    dtype: str
    """NumPy name of the type as stored, such as ``float16``."""
    tower: str
    """``image``, ``text`` or ``fused``: what it is computed from, and whose status it shares."""

    def __post_init__(self) -> None:
        check_name(self.name, "field")
        if self.name in _RESERVED_FIELDS or self.name.startswith("status_"):
            raise InputError(f"field name {self.name!r} is taken by the store; choose another")
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if any(size < 1 for size in self.shape):
            raise InputError(f"field {self.name!r} has shape {self.shape}; sizes start at 1")
        object.__setattr__(self, "dtype", np.dtype(self.dtype).name)
        if self.dtype not in _DTYPES:
            raise InputError(
                f"field {self.name!r} has dtype {self.dtype}; a store keeps "
                f"{', '.join(sorted(_DTYPES))}"
            )
        if self.tower not in TOWER_CONTENT:
            raise InputError(
                f"field {self.name!r} has tower {self.tower!r}; choose from "
                f"{', '.join(TOWER_CONTENT)}"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def fill_value(dtype: npt.DTypeLike) -> float | int | bool:
    """What stands for "nothing here": NaN for floats, else 0 or False."""
    kind = np.dtype(dtype).kind
    return math.nan if kind == "f" else (False if kind == "b" else 0)


def canonical_json(value: Any, what: str) -> str:
    """``value`` as JSON with sorted keys and no spaces: equal values give equal text.

    Raises:
        InputError: ``what`` holds something that JSON cannot hold.
    """
    try:
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        text.encode()
        return text
    except UnicodeEncodeError as error:
        before, after = error.object[: error.start], error.object[error.start :]
        name = before.rpartition('"')[2] + after.partition('"')[0]
        raise InputError(f"{what} holds a name that is not UTF-8: {name!r}; rename it") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} cannot be kept as JSON: {error}") from None


def fingerprint(identity: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of ``identity``."""
    return hashlib.sha256(canonical_json(identity, "identity").encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the features of one alias come from."""

    identity: dict[str, Any]
    """All that decides the numbers: architecture, weights hash, preprocessing, precision …"""
    context: dict[str, Any]
    """What is good to know and is not hashed: library versions, device, the spec as typed …"""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the canonical JSON of ``identity``."""
        return fingerprint(self.identity)


def difference(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """One line per key that differs, nested keys joined by dots."""
    left, right = dict(_flat(stored)), dict(_flat(asked))
    lines = []
    for key in sorted(left.keys() | right.keys()):
        has, wants = left.get(key, "nothing"), right.get(key, "nothing")
        if has != wants:
            lines.append(f"  {key}: the store has {has}, asked for {wants}")
    return lines


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping) and (value or not prefix):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, json.dumps(value, ensure_ascii=False)


def group_json(attributes: dict[str, Any]) -> dict[str, Any]:
    """The zarr v3 metadata of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def removed_json() -> dict[str, Any]:
    """The metadata of an alias that is being removed: none of what is still there counts."""
    return group_json({"mmc": {"format": FORMAT, "removed": True}})


@dataclass(frozen=True, kw_only=True)
class AliasRecord:
    """The attributes of ``features/<alias>``: written last, so an alias exists when it does."""

    generation: int
    """Which row order the arrays follow: equal to that of samples.parquet, or they are stale."""
    provenance: Provenance
    shard_rows: int
    compress: Compression
    fields: Mapping[str, FieldSpec]

    @property
    def towers(self) -> tuple[str, ...]:
        """Towers with at least one field, in the order of ``TOWER_CONTENT``."""
        present = {field.tower for field in self.fields.values()}
        return tuple(tower for tower in TOWER_CONTENT if tower in present)

    def of_tower(self, tower: str) -> dict[str, FieldSpec]:
        """Fields that share the status of ``tower``."""
        return {name: field for name, field in self.fields.items() if field.tower == tower}

    def to_json(self) -> dict[str, Any]:
        """The zarr v3 metadata of the alias's group."""
        fields = {
            field.name: {"shape": list(field.shape), "dtype": field.dtype, "tower": field.tower}
            for field in self.fields.values()
        }
        attributes = {
            "format": FORMAT,
            "generation": self.generation,
            "fingerprint": self.provenance.fingerprint,
            "identity": self.provenance.identity,
            "context": self.provenance.context,
            "shard_rows": self.shard_rows,
            "compress": self.compress,
            "fields": fields,
        }
        return group_json({"mmc": attributes})

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Self | None:
        """Parse the zarr.json of an alias; None when it is being removed (`removed_json`).

        Raises:
            DamagedStoreError: it is not JSON, lacks a key, or its hash is not that of its identity.
            FormatVersionError: a newer format.
        """
        attributes = mmc_attributes(raw, where)
        if attributes is None:
            raise DamagedStoreError(f"{where} has no mmc attributes; extract with --overwrite")
        if attributes.get("removed") is True:
            return None
        try:
            record = cls(
                generation=attributes["generation"],
                provenance=Provenance(
                    identity=attributes["identity"], context=attributes["context"]
                ),
                shard_rows=attributes["shard_rows"],
                compress=attributes["compress"],
                fields={
                    name: FieldSpec(
                        name=name, shape=item["shape"], dtype=item["dtype"], tower=item["tower"]
                    )
                    for name, item in attributes["fields"].items()
                },
            )
            same = attributes["fingerprint"] == record.provenance.fingerprint
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise DamagedStoreError(
                f"{where} is damaged: {type(error).__name__}: {error}"
            ) from None
        if not same:
            raise DamagedStoreError(
                f"{where} is damaged: its fingerprint is not the hash of its identity; "
                "extract with --overwrite"
            )
        return record


def mmc_attributes(raw: bytes, where: str, newest: int = FORMAT) -> dict[str, Any] | None:
    """The ``mmc`` attributes of a zarr.json; None when it is a zarr node without them.

    Args:
        newest: see `check_format`.

    Raises:
        DamagedStoreError: not JSON.
        FormatVersionError: a newer format than this mmc reads.
    """
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise DamagedStoreError(f"{where} is damaged: it is not JSON ({error})") from None
    attributes = data.get("attributes", {}).get("mmc") if isinstance(data, dict) else None
    if not isinstance(attributes, dict):
        return None
    check_format(attributes.get("format"), where, newest)
    return attributes


def check_format(version: object, where: str, newest: int = FORMAT) -> None:
    """Refuse formats that this mmc does not read.

    Args:
        newest: that it reads of what there is at ``where``.

    Raises:
        FormatVersionError: newer than ours.
        DamagedStoreError: not a version number.
    """
    if not isinstance(version, int) or version < 1:
        raise DamagedStoreError(f"{where} has no format version (got {version!r})")
    if version > newest:
        raise FormatVersionError(
            f"{where} has format {version} and this mmc reads up to {newest}; upgrade mmc"
        )


def dump(data: dict[str, Any]) -> bytes:
    """JSON for a zarr.json: indented, for people."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
