"""A conformance suite for places a store can live in: folders, ``memory://``, object stores.

``CHECKS`` holds functions that take the path of a store that does not exist yet; each raises
AssertionError when the store breaks a promise. Run them all over a new kind of file system::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_file_system(check):
        check(f"myfs://bucket/{uuid.uuid4()}")
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmc.store.errors import (
    DamagedStoreError,
    FingerprintMismatchError,
    InputError,
    MmcError,
    NotAStoreError,
    RowsNotDoneError,
)
from mmc.store.reader import EmbeddingStore
from mmc.store.schema import Compression, FieldSpec
from mmc.store.verify import compact, repair, verify
from mmc.store.writer import Writer

Array = npt.NDArray[Any]

ALIAS = "clip"
LABELS = ("cat", "dog", "owl")
SOURCE = {"spec": "samples.csv", "format": "csv"}
IDENTITY = {"architecture": "ViT", "weights": {"sha256": "00ff"}, "precision": "float32"}
FIELDS = (
    FieldSpec(name="image", shape=(4,), dtype="float16", tower="image"),
    FieldSpec(name="text_tokens", shape=(3, 2), dtype="float32", tower="text"),
    FieldSpec(name="text_mask", shape=(3,), dtype="bool", tower="text"),
)
SHARD_ROWS = 8


def samples_table(numbers: Sequence[int], **columns: Sequence[Any]) -> pa.Table:
    """Samples ``s<number>``, each with its own image and text; ``columns`` replace or add."""
    data: dict[str, Any] = {
        "id": [f"s{number}" for number in numbers],
        "split": [("train", "val", "test")[number % 3] for number in numbers],
        "labels": pa.array([[number % 3] for number in numbers], pa.list_(pa.int32())),
        "text": [f"text {number}" for number in numbers],
        "image": [f"{number}.png" for number in numbers],
        "image_key": [f"i{number}" for number in numbers],
        "text_key": [f"t{number}" for number in numbers],
    }
    return pa.table({**data, **columns})


def embedding(field: FieldSpec, content: str) -> Array:
    """What a backbone would give for ``content``: the same numbers each time."""
    generator = np.random.default_rng(zlib.crc32(f"{field.name} {content}".encode()))
    values = generator.standard_normal(field.shape)
    return values > 0 if field.dtype == "bool" else values.astype(field.dtype)


def expected(store: EmbeddingStore, field: FieldSpec, rows: Sequence[int]) -> Array:
    """What ``rows`` of a filled store must hold, (n, *shape)."""
    keys = store.column(f"{field.tower}_key").to_pylist()
    blocks = [embedding(field, str(keys[row])) for row in rows]
    return np.stack(blocks) if blocks else np.empty((0, *field.shape), field.dtype)


def fill(
    store: EmbeddingStore,
    writer: Writer,
    *,
    bad: Mapping[int, str] | None = None,
    shards: int | None = None,
) -> int:
    """Commit what is pending, as an extraction would; how many rows that were.

    Args:
        store: that the writer belongs to.
        writer: open.
        bad: rows whose image cannot be read, and why.
        shards: stop after so many commits.
    """
    fields = {field.name: field for field in FIELDS}
    written = commits = 0
    for tower in dict.fromkeys(field.tower for field in writer.fields.values()):
        pending = writer.pending(tower)
        for shard in range(writer.num_shards):
            start, stop = writer.bounds(shard)
            rows = pending[(pending >= start) & (pending < stop)]
            if not len(rows) or (shards is not None and commits >= shards):
                continue
            failed = {
                row: reason
                for row, reason in (bad or {}).items()
                if tower == "image" and row in rows
            }
            rows = rows[~np.isin(rows, list(failed))]
            arrays = {
                name: expected(store, fields[name], rows.tolist())
                for name, field in writer.fields.items()
                if field.tower == tower
            }
            writer.commit(shard, tower, rows, arrays, failed)
            written += len(rows) + len(failed)
            commits += 1
    return written


def filled(
    path: str,
    numbers: Sequence[int] = range(20),
    *,
    bad: Mapping[int, str] | None = None,
    compress: Compression = None,
) -> EmbeddingStore:
    """A new store with everything extracted."""
    store = EmbeddingStore.create(
        path, samples_table(numbers), label_set=LABELS, task="multilabel", source=SOURCE
    )
    with store.writer(ALIAS, FIELDS, IDENTITY, {}, SHARD_ROWS, compress) as writer:
        fill(store, writer, bad=bad)
    return store


def expect(condition: object, promise: str) -> None:
    """Raise AssertionError with the promise that was broken."""
    if not condition:
        raise AssertionError(promise)


@contextlib.contextmanager
def refusal(error: type[MmcError], promise: str) -> Iterator[None]:
    """Expect ``error``, with a message of one line or more."""
    try:
        yield
    except error as raised:
        expect(str(raised), f"{promise}: the message is empty")
    else:
        raise AssertionError(f"{promise}: {error.__name__} was expected")


def expect_whole(store: EmbeddingStore, failed: Sequence[int] = ()) -> None:
    """Every row that is done holds the numbers of its content, by each way of reading."""
    for field in FIELDS:
        feature = store[f"{ALIAS}/{field.name}"]
        done = np.flatnonzero(feature.done)
        missing = failed if field.tower == "image" else ()
        expect(
            set(range(len(store))) - set(done.tolist()) == set(missing),
            f"{field.name}: the rows that are done are all but those that failed",
        )
        truth = expected(store, field, done.tolist())
        expect(np.array_equal(feature.take(done), truth), f"{field.name}: take gives the numbers")
        backwards = np.concatenate([done[::-1], done[:3]])
        expect(
            np.array_equal(feature.take(backwards), np.concatenate([truth[::-1], truth[:3]])),
            f"{field.name}: take in any order, rows repeated",
        )
        whole = np.concatenate([block for _, block in feature.blocks(5, missing="fill")])
        expect(np.array_equal(whole[done], truth), f"{field.name}: blocks give the numbers")
        if missing and field.dtype != "bool":
            expect(np.isnan(whole[list(missing)]).all(), "rows that failed are NaN, never zeros")


def check_create_and_open(path: str) -> None:
    """What was created is there when it is opened again."""
    with refusal(NotAStoreError, "nothing is there yet"):
        EmbeddingStore.open(path)
    table = samples_table(range(5), price=[1.5, 2.5, None, 4.5, 5.5])
    EmbeddingStore.create(path, table, label_set=LABELS, task="multilabel", source=SOURCE)
    store = EmbeddingStore.open(path)
    expect(len(store) == 5 and store.label_set == LABELS, "rows and label set are kept")
    expect(store.task == "multilabel" and store.sources == [SOURCE], "task and source are kept")
    expect(store.column("price").to_pylist() == [1.5, 2.5, None, 4.5, 5.5], "columns are kept")
    expect(store.features == (), "there are no features yet")
    expect(store.rows(split="val").tolist() == [1, 4], "splits are kept")
    with refusal(InputError, "a path is created once"):
        EmbeddingStore.create(path, table, label_set=LABELS, task="multilabel", source=SOURCE)


def check_fill_and_read(path: str) -> None:
    """All numbers come back, uncompressed."""
    expect_whole(filled(path))
    expect(verify(EmbeddingStore.open(path)) == [], "a filled store has no problems")


def check_zstd(path: str) -> None:
    """All numbers come back, compressed."""
    expect_whole(filled(path, compress="zstd"))
    expect(verify(EmbeddingStore.open(path)) == [], "a filled store has no problems")


def check_failed_rows(path: str) -> None:
    """A row that failed has a reason, no embedding, and can be tried again."""
    store = filled(path, bad={3: "not an image", 17: "truncated"})
    expect_whole(store, failed=[3, 17])
    reasons = [
        (item["row"], item["id"], item["reason"]) for item in store.errors(ALIAS).to_pylist()
    ]
    expect(reasons == [(3, "s3", "not an image"), (17, "s17", "truncated")], "reasons are kept")
    with refusal(RowsNotDoneError, "rows that failed cannot be read"):
        store[f"{ALIAS}/image"].take([2, 3])
    rows = store.rows(features=[f"{ALIAS}/image", f"{ALIAS}/text_mask"])
    expect(rows.tolist() == [row for row in range(20) if row not in (3, 17)], "rows() leaves out")
    with store.writer(ALIAS, FIELDS, IDENTITY, {}) as writer:
        expect(len(writer.pending("image")) == 0, "failed rows are not pending")
        expect(writer.pending("image", retry_failed=True).tolist() == [3, 17], "unless asked for")
        for row in (3, 17):
            values = expected(store, FIELDS[0], [row])
            writer.commit(row // SHARD_ROWS, "image", [row], {"image": values})
    expect_whole(store)
    expect(store.errors(ALIAS).num_rows == 0, "a reason goes when its row succeeds")


def check_resume(path: str) -> None:
    """A writer that stopped early leaves the rest pending, and the next one adds just that."""
    store = EmbeddingStore.create(
        path, samples_table(range(20)), label_set=LABELS, task="multilabel", source=SOURCE
    )
    with store.writer(ALIAS, FIELDS, IDENTITY, {}, SHARD_ROWS) as writer:
        fill(store, writer, shards=2)
    feature = store[f"{ALIAS}/image"]
    expect(feature.done.sum() == 16, "two shards are done")
    with refusal(RowsNotDoneError, "rows that were never committed cannot be read"):
        feature[:]
    with store.writer(ALIAS, FIELDS, IDENTITY, {}) as writer:
        expect(fill(store, writer) == 24, "the rest is pending")
    with store.writer(ALIAS, FIELDS, IDENTITY, {}) as writer:
        expect(fill(store, writer) == 0, "nothing is left")
    expect_whole(store)


def check_growth(path: str) -> None:
    """New samples are appended; what is there stays."""
    store = filled(path, range(11))
    report = store.sync(
        samples_table(range(30)), label_set=LABELS, task="multilabel", source=SOURCE
    )
    expect((report.added, report.unchanged) == (19, 11), "the report counts new rows")
    expect(store[f"{ALIAS}/image"].done.tolist() == [True] * 11 + [False] * 19, "they are missing")
    with store.writer(ALIAS, FIELDS, IDENTITY, {}) as writer:
        expect(fill(store, writer) == 2 * 19, "only they are pending")
    expect_whole(store)


def check_changed_content(path: str) -> None:
    """Another picture costs the image tower, another text the text tower, of those rows alone."""
    store = filled(path)
    keys = store.column("image_key").to_pylist()
    texts = store.column("text_key").to_pylist()
    keys[5], texts[9] = "new picture", "new text"
    report = store.sync(
        samples_table(range(20), image_key=keys, text_key=texts),
        label_set=LABELS,
        task="multilabel",
        source=SOURCE,
    )
    expect((report.changed_images, report.changed_texts) == (1, 1), "the report counts them")
    with store.writer(ALIAS, FIELDS, IDENTITY, {}) as writer:
        expect(writer.pending("image").tolist() == [5], "the image tower has row 5 to do")
        expect(writer.pending("text").tolist() == [9], "the text tower has row 9 to do")
        fill(store, writer)
    expect_whole(store)


def check_relabel(path: str) -> None:
    """New labels touch no feature; another order of the label set keeps each row's labels."""
    store = filled(path, range(6))
    labels = pa.array([[0], [1], [2], [3], [], None], pa.list_(pa.int32()))
    report = store.sync(
        samples_table(range(6), labels=labels),
        label_set=("dog", "cat", "owl", "ant"),
        task="multilabel",
        source=SOURCE,
    )
    expect(store.label_set == ("dog", "cat", "owl", "ant"), "the only source decides the labels")
    hot = store.labels.multi_hot()
    truth = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0] * 4, [-1] * 4]
    expect(hot.tolist() == truth, "labels follow their names")
    expect(report.changed_images == report.changed_texts == 0, "no content changed")
    expect_whole(store)


def check_gone_and_compact(path: str) -> None:
    """Rows that are gone are left out, come back when their sample does, and can be dropped."""
    store = filled(path, bad={2: "bad", 9: "bad"})
    kept = [number for number in range(20) if number % 4 != 1]
    table = samples_table(kept)
    arguments: dict[str, Any] = {"label_set": LABELS, "task": "multilabel", "source": SOURCE}
    expect(store.sync(table, **arguments).gone == 5, "five samples are gone")
    expect(store.rows().tolist() == kept, "rows() leaves them out")
    expect(store.sync(samples_table(range(20)), **arguments).added == 5, "they come back")
    expect_whole(store, failed=[2, 9])
    store.sync(table, **arguments)
    expect(compact(store).dropped == 5, "five rows are dropped")
    with refusal(MmcError, "a store opened before does not mix row orders"):
        _ = store[f"{ALIAS}/image"]
    store = EmbeddingStore.open(path)
    expect(store.column("id").to_pylist() == [f"s{number}" for number in kept], "the rest stays")
    expect_whole(store, failed=[kept.index(2)])
    expect(store.errors(ALIAS).column("id").to_pylist() == ["s2"], "reasons move with their rows")
    expect(compact(store).dropped == 0 and verify(store) == [], "nothing is left to drop")


def check_refusal(path: str) -> None:
    """Features made differently are never mixed."""
    store = filled(path)
    other = {**IDENTITY, "weights": {"sha256": "beef"}}
    try:
        with store.writer(ALIAS, FIELDS, other, {}):
            pass
    except FingerprintMismatchError as error:
        expect('weights.sha256: the store has "00ff", asked for "beef"' in str(error), "difference")
        expect("precision" not in str(error), "what is the same is not listed")
    else:
        raise AssertionError("another identity must be refused")
    expect_whole(store)
    with store.writer(ALIAS, FIELDS, other, {}, SHARD_ROWS, overwrite=True) as writer:
        expect(len(writer.pending("image")) == 20, "overwrite starts anew")
        fill(store, writer)
    expect_whole(store)
    expect(store.provenance(ALIAS).identity == other, "with the new identity")


def check_label_text(path: str) -> None:
    """The embeddings of label prompts come back with their names."""
    store = filled(path, range(3))
    expect(store.label_text(ALIAS) is None, "there are none yet")
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    with store.writer(ALIAS, FIELDS, IDENTITY, {}) as writer:
        writer.write_label_text(LABELS, values, "a photo of a {label}")
    found = store.label_text(ALIAS)
    expect(found is not None and found[0] == LABELS, "the names")
    expect(found is not None and np.array_equal(found[1], values), "the numbers")
    expect(store.label_prompt(ALIAS) == "a photo of a {label}", "the prompt")


def check_damage(path: str) -> None:
    """A deleted, truncated or flipped shard is an error that names it, and can be repaired."""
    store = filled(path)
    key = f"features/{ALIAS}/image/c.1.0"
    good = store.files.read(key)
    expect(good is not None, "the shard is where FORMAT.md says")
    assert good is not None
    flipped = bytes([good[3] ^ 16])
    for name, bad in {
        "deleted": None,
        "flipped": good[:3] + flipped + good[4:],
        "truncated": good[:-9],
        "empty": b"",
    }.items():
        store.files.remove(key)
        if bad is not None:
            store.files.write(key, [bad])
        feature = store[f"{ALIAS}/image"]
        for rows in (slice(None), slice(9, 12), np.arange(0, 20, 2)):
            with refusal(DamagedStoreError, f"{name}: reading {rows}"):
                feature.take(rows)
        expect(np.array_equal(feature[:8], expected(store, FIELDS[0], range(8))), "the rest reads")
        problems = verify(store)
        expect([(p.kind, p.shard, key in p.file) for p in problems] == [("shard", 1, True)], name)
    repair(store)
    expect(store[f"{ALIAS}/image"].done.sum() == 12, "the damaged shard is missing")
    with store.writer(ALIAS, FIELDS, IDENTITY, {}) as writer:
        expect(writer.pending("image").tolist() == list(range(8, 16)), "and pending")
        fill(store, writer)
    expect_whole(store)
    expect(verify(store) == [], "then all is well")


def check_plain_zarr(path: str) -> None:
    """Anyone's zarr reader finds the same numbers."""
    import zarr  # only here: reading and writing need no zarr library

    store = filled(path, bad={3: "bad"})
    group: Any = zarr.open_group(path, mode="r")
    expect(group.attrs["mmc"]["label_set"] == list(LABELS), "the label set is in the attributes")
    for field in FIELDS:
        array = group[f"features/{ALIAS}/{field.name}"][:]
        ours = store[f"{ALIAS}/{field.name}"].take(slice(None), missing="fill")
        expect(
            np.array_equal(array, ours, equal_nan=field.dtype != "bool"), f"{field.name} is equal"
        )
    for tower in ("image", "text"):
        status = group[f"features/{ALIAS}/status_{tower}"][:]
        expect(np.array_equal(status, store.status(ALIAS, tower)), f"status of {tower} is equal")


CHECKS: tuple[Callable[[str], None], ...] = (
    check_create_and_open,
    check_fill_and_read,
    check_zstd,
    check_failed_rows,
    check_resume,
    check_growth,
    check_changed_content,
    check_relabel,
    check_gone_and_compact,
    check_refusal,
    check_label_text,
    check_damage,
    check_plain_zarr,
)
