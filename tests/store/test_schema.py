"""Fields, layouts and fingerprints."""

import hashlib
import json
from typing import Any

import numpy as np
import pytest

from mmc.store.errors import DamagedStoreError, FormatVersionError, InputError
from mmc.store.layout import Layout, default_chunk_rows, default_shard_rows
from mmc.store.schema import (
    AliasRecord,
    FieldSpec,
    Provenance,
    canonical_json,
    difference,
    dump,
    fingerprint,
    removed_json,
)


@pytest.mark.parametrize(
    ("rows", "row_bytes", "shard_rows"),
    [
        (0, 1024, 1024),
        (1, 1024, 1024),
        (32_768, 1024, 1024),
        (32_769, 1024, 2048),
        (400_000, 1024, 16_384),
        (100_000_000, 1024, 65_536),
        (100_000_000, 77 * 512 * 2, 2048),
        (100_000_000, 64 << 20, 16),
    ],
)
def test_default_shard_rows(rows: int, row_bytes: int, shard_rows: int) -> None:
    assert default_shard_rows(rows, row_bytes) == shard_rows


@pytest.mark.parametrize(
    ("shard_rows", "row_bytes", "chunk_rows"),
    [(8192, 1024, 4096), (1024, 1024, 1024), (65_536, 3, 65_536), (64, 5 << 20, 1), (10, 3, 10)],
)
def test_default_chunk_rows_divides_the_shard(
    shard_rows: int, row_bytes: int, chunk_rows: int
) -> None:
    assert default_chunk_rows(shard_rows, row_bytes) == chunk_rows
    assert shard_rows % chunk_rows == 0


def field(**changes: Any) -> FieldSpec:
    values = {"name": "image", "shape": (4,), "dtype": "float16", "tower": "image", **changes}
    return FieldSpec(**values)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"name": "a/b"}, "folder"),
        ({"name": ""}, "folder"),
        ({"name": "status_image"}, "taken"),
        ({"name": "label_text"}, "taken"),
        ({"shape": (0,)}, "sizes start at 1"),
        ({"dtype": "complex64"}, "complex64"),
        ({"dtype": "str"}, "str"),
        ({"tower": "audio"}, "audio"),
    ],
)
def test_field_refuses(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        field(**changes)


def test_field_takes_what_numpy_takes() -> None:
    spec = field(shape=[np.int64(2), 3], dtype=np.dtype("<f4"))
    assert (spec.shape, spec.dtype, spec.row_bytes) == ((2, 3), "float32", 24)


def test_fingerprint_is_the_hash_of_sorted_compact_json() -> None:
    text = '{"a":{"x":1,"ü":[1,2]},"b":null}'
    assert fingerprint({"b": None, "a": {"ü": (1, 2), "x": 1}}) == (
        hashlib.sha256(text.encode()).hexdigest()
    )


def test_identity_must_be_json() -> None:
    with pytest.raises(InputError, match="identity"):
        fingerprint({"a": float("nan")})
    with pytest.raises(InputError, match="context"):
        canonical_json({"a": object()}, "context")


def test_difference_names_each_nested_key_once() -> None:
    stored = {"a": 1, "b": {"c": 2, "d": 3}, "only": True}
    asked = {"a": 1, "b": {"c": 5, "d": 3}, "new": {}}
    assert difference(stored, asked) == [
        "  b.c: the store has 2, asked for 5",
        "  new: the store has nothing, asked for {}",
        "  only: the store has true, asked for nothing",
    ]


def record() -> AliasRecord:
    return AliasRecord(
        generation=2,
        provenance=Provenance(identity={"a": 1}, context={"torch": "2"}),
        shard_rows=8,
        compress=None,
        fields={"image": field(), "text": field(name="text", tower="text")},
    )


def test_record_survives_a_round_trip() -> None:
    again = AliasRecord.from_bytes(dump(record().to_json()), "x")
    assert again == record()
    assert again.towers == ("image", "text")


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        (["format"], 2, FormatVersionError),
        (["format"], "1", DamagedStoreError),
        (["identity", "a"], 2, DamagedStoreError),
        (["fields", "image", "tower"], "audio", DamagedStoreError),
        (["fields"], None, DamagedStoreError),
    ],
)
def test_record_refuses_what_was_not_written(
    path: list[str], value: Any, error: type[Exception]
) -> None:
    data = record().to_json()
    at = data["attributes"]["mmc"]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(error, match=r"here/zarr\.json"):
        AliasRecord.from_bytes(json.dumps(data).encode(), "here/zarr.json")


def test_an_alias_that_is_being_removed_has_no_record() -> None:
    assert AliasRecord.from_bytes(dump(removed_json()), "x") is None
    newer = dump(removed_json()).replace(b'"format": 1', b'"format": 2')
    with pytest.raises(FormatVersionError):
        AliasRecord.from_bytes(newer, "x")


@pytest.mark.parametrize("raw", [b"", b"[1]", b"{", b'{"attributes": {}}'])
def test_record_refuses_other_files(raw: bytes) -> None:
    with pytest.raises(DamagedStoreError):
        AliasRecord.from_bytes(raw, "x")


def test_layout_reads_back_its_metadata_and_nothing_else() -> None:
    layout = Layout.of(field(shape=(3, 2)), 100, 16, "zstd")
    data = json.loads(json.dumps(layout.to_json()))
    assert Layout.from_json(data, "x") == layout
    assert layout.key(3) == "c.3.0.0"
    assert layout.bounds(6) == (96, 100)
    for key, value in [
        ("fill_value", 0),
        ("data_type", "int8"),
        ("codecs", []),
        ("chunk_key_encoding", {"name": "v2"}),
        ("shape", [100]),
    ]:
        with pytest.raises(DamagedStoreError):
            Layout.from_json({**data, key: value}, "x")
