"""A process may die between any two writes: the store opens, never lies, and goes on.

``Killer`` stops an operation at its k-th step; a step is a file written (half of its temporary
gets there), a folder moved, a removal, or the put, copy or removal of an object. (Dying between
the temporary and its rename differs only in bytes that nobody reads.)
"""

import contextlib
import io
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mmc.store import EmbeddingStore, compact, files, repair, verify
from mmc.store.errors import MmcError
from mmc.store.schema import DONE, FAILED
from mmc.store.testing import ALIAS, FIELDS, IDENTITY, SOURCE, expected, fill, samples_table

TOWERS = ("image", "text")
LABELS = ("cat", "dog", "owl")


class Killed(BaseException):
    """The process died here; no ``except Exception`` may catch it."""


class Killer:
    """Counts steps and dies at one of them."""

    def __init__(self, at: int | None) -> None:
        self.left = at
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.left is not None and self.steps > self.left:
            raise Killed

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*args: Any, **kwargs: Any) -> Any:
            self.step()
            return function(*args, **kwargs)

        return stepping

    def write_temporary(self, path: Path, fill_file: Callable[[BinaryIO], None]) -> None:
        buffer = io.BytesIO()
        fill_file(buffer)
        data = buffer.getvalue()
        try:
            self.step()
        except Killed:
            path.write_bytes(data[: len(data) // 2])
            raise
        path.write_bytes(data)

    def rename(self, source: Path, target: Path) -> None:
        if source.is_dir():
            self.step()
        source.replace(target)


@contextlib.contextmanager
def killing(at: int | None) -> Iterator[Killer]:
    """Run the body until its ``at``-th step; being killed is no error."""
    killer = Killer(at)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write_temporary", killer.write_temporary)
        patch.setattr(files, "rename", killer.rename)
        patch.setattr(files, "remove", killer.before(files.remove))
        patch.setattr(files.shutil, "rmtree", killer.before(files.shutil.rmtree))
        for name in ("pipe_file", "cp_file", "rm_file"):
            patch.setattr(MemoryFileSystem, name, killer.before(getattr(MemoryFileSystem, name)))
        with contextlib.suppress(Killed):
            yield killer


Row = dict[str, Any]
Must = set[tuple[str, str]]


class Model:
    """A store in plain dictionaries, and (id, tower) pairs that must be done."""

    def __init__(self, rows: dict[str, Row], must: Must) -> None:
        self.rows = rows
        self.must = must

    def table(self) -> pa.Table:
        """What a source would give: the rows that are not gone."""
        live = [(name, row) for name, row in self.rows.items() if not row["gone"]]
        numbers = [int(name[1:]) for name, _ in live]
        columns = {key: [row[key] for _, row in live] for key in ("image_key", "text_key", "split")}
        return samples_table(numbers, labels=[row["labels"] for _, row in live], **columns)


def seen(store: EmbeddingStore) -> dict[str, Row]:
    """The table of a store as a model's rows."""
    keys = ("image_key", "text_key", "split", "labels")
    return {
        row["id"]: {**{key: row[key] for key in keys}, "gone": row["_gone"]}
        for row in store.samples.to_pylist()
    }


def check_truth(path: str) -> EmbeddingStore:
    """Whatever happened: what is marked as done holds the numbers of its present content."""
    store = EmbeddingStore.open(path)
    problems = [problem for problem in verify(store) if problem.kind != "root"]
    assert problems == []
    if ALIAS not in store.aliases:
        return store
    for field in FIELDS:
        if f"{ALIAS}/{field.name}" not in store:
            continue
        feature = store[f"{ALIAS}/{field.name}"]
        done = np.flatnonzero(feature.done)
        truth = expected(store, field, done.tolist())
        np.testing.assert_array_equal(feature.take(done), truth)
        whole = feature.take(slice(None), missing="fill")
        np.testing.assert_array_equal(whole[done], truth)
        if field.dtype != "bool":
            assert np.isnan(whole[~feature.done]).all()
    for tower in store.record(ALIAS).towers:
        failed = np.flatnonzero(store.status(ALIAS, tower) == FAILED)
        errors = store.errors(ALIAS).to_pylist()
        assert [item["row"] for item in errors if item["tower"] == tower] == failed.tolist()
        ids = store.column("id").to_pylist()
        assert all(item["id"] == ids[item["row"]] for item in errors)
    return store


def done_pairs(store: EmbeddingStore) -> Must:
    """(id, tower) of everything that is done."""
    if ALIAS not in store.aliases:
        return set()
    ids = store.column("id").to_pylist()
    return {
        (ids[row], tower)
        for tower in store.record(ALIAS).towers
        for row in np.flatnonzero(store.status(ALIAS, tower) == DONE).tolist()
    }


class StoreMachine(RuleBasedStateMachine):
    """Grows, changes, extracts, compacts and kills a store at random."""

    kills = st.none() | st.integers(0, 60)

    def new_path(self) -> str:
        self.folder = tempfile.TemporaryDirectory()
        return f"{self.folder.name}/s"

    def teardown(self) -> None:
        self.folder.cleanup()

    @initialize(rows=st.integers(0, 12), kill=kills)
    def create(self, rows: int, kill: int | None) -> None:
        self.path = self.new_path()
        model = {f"s{number}": self.fresh(number) for number in range(rows)}
        self.model = Model(model, set())
        self.stamps = itertools.count()
        self.next = rows
        for at in (kill, None):
            with killing(at), contextlib.suppress(MmcError):
                EmbeddingStore.create(
                    self.path,
                    self.model.table(),
                    label_set=LABELS,
                    task="multilabel",
                    source=SOURCE,
                )

    @staticmethod
    def fresh(number: int) -> Row:
        return {
            "image_key": f"i{number}",
            "text_key": f"t{number}",
            "split": "train",
            "labels": [number % 3],
            "gone": False,
        }

    @rule(data=st.data(), added=st.integers(0, 9), kill=kills)
    def sync(self, data: st.DataObject, added: int, kill: int | None) -> None:
        old = self.model
        new = Model({name: dict(row) for name, row in old.rows.items()}, set(old.must))
        names = st.sampled_from(sorted(new.rows)) if new.rows else st.nothing()
        picks = st.sets(names, max_size=3) if new.rows else st.just(set())
        for name in data.draw(picks):
            new.rows[name]["gone"] = not new.rows[name]["gone"]
        for key, tower in (("image_key", "image"), ("text_key", "text")):
            for name in data.draw(picks):
                if not new.rows[name]["gone"]:
                    new.rows[name][key] = f"{key}{next(self.stamps)}"
                    new.must.discard((name, tower))
        for name in data.draw(picks):
            if not new.rows[name]["gone"]:
                new.rows[name]["labels"] = sorted(data.draw(st.sets(st.integers(0, 2))))
                new.rows[name]["split"] = data.draw(st.sampled_from(["train", "val"]))
        for _ in range(added):
            new.rows[f"s{self.next}"] = self.fresh(self.next)
            self.next += 1
        with killing(kill):
            store = EmbeddingStore.open(self.path)
            store.sync(new.table(), label_set=LABELS, task="multilabel", source=SOURCE)
        self.settle(old, new, killed=kill is not None)

    @rule(
        shards=st.none() | st.integers(0, 3),
        towers=st.sampled_from([("image",), ("image", "text")]),
        fail=st.booleans(),
        overwrite=st.booleans(),
        kill=kills,
    )
    def extract(
        self,
        shards: int | None,
        towers: tuple[str, ...],
        fail: bool,
        overwrite: bool,
        kill: int | None,
    ) -> None:
        old = self.model
        fields = [field for field in FIELDS if field.tower in towers]
        killed = True
        with killing(kill):
            store = EmbeddingStore.open(self.path)
            with store.writer(ALIAS, fields, IDENTITY, {}, 4, overwrite=overwrite) as writer:
                pending = writer.pending("image", retry_failed=True).tolist()
                bad = {row: f"bad {row}" for row in pending if fail and row % 5 == 2}
                fill(store, writer, bad=bad, shards=shards)
            killed = False
        must = set() if overwrite else old.must
        self.settle(old, Model(old.rows, must), killed=killed)
        if not killed and shards is None and not fail:
            store = EmbeddingStore.open(self.path)
            for tower in towers:
                assert (store.status(ALIAS, tower)[store.live] != 0).all()

    @rule(kill=kills)
    def compact(self, kill: int | None) -> None:
        old = self.model
        rows = {name: row for name, row in old.rows.items() if not row["gone"]}
        new = Model(rows, {pair for pair in old.must if pair[0] in rows})
        with killing(kill):
            compact(EmbeddingStore.open(self.path))
        self.settle(old, new, killed=kill is not None)

    @rule(kill=kills)
    def repair(self, kill: int | None) -> None:
        with killing(kill):
            repair(EmbeddingStore.open(self.path))
        self.settle(self.model, self.model, killed=kill is not None)

    @precondition(lambda self: self.model.must)
    @rule(labels=st.integers(1, 3), kill=kills)
    def label_text(self, labels: int, kill: int | None) -> None:
        names = LABELS[:labels]
        values = np.full((labels, 2), labels, "float32")
        with killing(kill):
            store = EmbeddingStore.open(self.path)
            with store.writer(ALIAS, FIELDS[:1], IDENTITY, {}) as writer:
                writer.write_label_text(names, values, "{label}")
        found = EmbeddingStore.open(self.path).label_text(ALIAS)
        assert found is None or (found[1] == len(found[0])).all()
        if kill is None:
            assert found is not None
            assert found[0] == names

    def settle(self, old: Model, new: Model, *, killed: bool) -> None:
        """The table is the new one, or after a kill perhaps the old one; done rows stay done."""
        store = check_truth(self.path)
        rows = seen(store)
        if killed:
            assert rows in (old.rows, new.rows)
        else:
            assert rows == new.rows
        self.model = Model(rows, done_pairs(store))
        # What both would have done no kill may lose; without a kill nothing at all is lost.
        kept = (old.must & new.must) if killed else new.must
        assert {pair for pair in kept if pair[0] in rows} <= self.model.must

    @invariant()
    def plain_rows(self) -> None:
        """rows() leaves out what is gone, at any time."""
        if hasattr(self, "model"):
            live = [not row["gone"] for row in self.model.rows.values()]
            assert EmbeddingStore.open(self.path).rows().tolist() == np.flatnonzero(live).tolist()


class MemoryMachine(StoreMachine):
    """The same in an object store."""

    def new_path(self) -> str:
        return "memory://machine"

    def teardown(self) -> None:
        MemoryFileSystem.store.clear()


SETTINGS = settings(max_examples=12, stateful_step_count=12, deadline=None)
TestLocal = StoreMachine.TestCase
TestLocal.settings = SETTINGS
TestMemory = MemoryMachine.TestCase
TestMemory.settings = SETTINGS


class Place:
    """Where the stores of a test are; one at a time, so that listing stays quick."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.path = f"{folder}/now" if folder else "memory://now"

    def clear(self) -> None:
        if self.folder:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            MemoryFileSystem.store.clear()
            MemoryFileSystem.pseudo_dirs[:] = [""]

    def save(self) -> Any:
        """Everything as it is now."""
        if not self.folder:
            return {path: file.getvalue() for path, file in MemoryFileSystem.store.items()}
        if Path(self.path).exists():
            shutil.copytree(self.path, self.folder / "saved")
        return None

    def restore(self, saved: Any) -> None:
        """Everything as it was."""
        self.clear()
        if not self.folder:
            for path, data in saved.items():
                MemoryFileSystem().pipe_file(path, data)
        elif (self.folder / "saved").exists():
            shutil.copytree(self.folder / "saved", self.path)


def every_kill(place: Place, operation: Callable[[str], Any]) -> Iterator[str]:
    """The path after ``operation`` was killed at its first, second, … last step."""
    saved = place.save()
    with killing(None) as killer:
        operation(place.path)
    assert killer.steps >= 3
    for step in range(killer.steps):
        place.restore(saved)
        with killing(step) as killer:
            operation(place.path)
        assert killer.steps == step + 1
        yield place.path


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Gives a new path each time."""
    place = Place(tmp_path if request.param == "local" else None)
    place.clear()
    yield place
    place.clear()


def make(path: str) -> None:
    EmbeddingStore.create(
        path, samples_table(range(10)), label_set=LABELS, task="multilabel", source=SOURCE
    )


def extract(path: str) -> None:
    store = EmbeddingStore.open(path)
    with store.writer(ALIAS, FIELDS, IDENTITY, {}, 8) as writer:
        fill(store, writer, bad={1: "bad"})
        writer.write_label_text(LABELS, np.ones((3, 2)), "{label}")


def test_create_is_killed_anywhere(place: Place) -> None:
    for path in every_kill(place, make):
        with contextlib.suppress(MmcError):
            make(path)
        assert len(check_truth(path)) == 10


def test_extract_is_killed_anywhere(place: Place) -> None:
    make(place.path)
    for path in every_kill(place, extract):
        check_truth(path)
        extract(path)
        store = check_truth(path)
        assert store.status(ALIAS, "image").tolist() == [1, 2, *[1] * 8]
        assert store.status(ALIAS, "text").tolist() == [1] * 10
        assert store.label_text(ALIAS) is not None


def test_sync_is_killed_anywhere(place: Place) -> None:
    keys = [f"i{number}" for number in range(10)]
    keys[3], keys[9] = "new", "new too"
    table = samples_table(range(12), image_key=[*keys, "i10", "i11"])

    def change(path: str) -> None:
        store = EmbeddingStore.open(path)
        store.sync(table, label_set=(*LABELS, "eel"), task="multilabel", source=SOURCE)

    make(place.path)
    extract(place.path)
    for path in every_kill(place, change):
        store = check_truth(path)
        assert len(store) in (10, 12)
        change(path)
        store = check_truth(path)
        assert store.column("image_key").to_pylist() == [*keys, "i10", "i11"]
        assert store.status(ALIAS, "image").tolist() == [1, 2, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0]
        extract(path)
        assert (check_truth(path).status(ALIAS, "text") == DONE).all()


def test_compact_is_killed_anywhere(place: Place) -> None:
    def shrink(path: str) -> None:
        store = EmbeddingStore.open(path)
        store.sync(
            samples_table(range(1, 10, 2)), label_set=LABELS, task="multilabel", source=SOURCE
        )

    for operation in (make, extract, shrink):
        operation(place.path)
    for path in every_kill(place, lambda path: compact(EmbeddingStore.open(path))):
        store = check_truth(path)
        assert store.status(ALIAS, "image")[store.live].tolist() == [2, 1, 1, 1, 1]
        extract(path)
        compact(EmbeddingStore.open(path))
        store = check_truth(path)
        assert store.column("id").to_pylist() == ["s1", "s3", "s5", "s7", "s9"]
        assert store.status(ALIAS, "text").tolist() == [1] * 5
        assert store.label_text(ALIAS) is not None
        assert store.files.names("compact") == []


def test_overwrite_is_killed_anywhere(place: Place) -> None:
    def overwrite(path: str) -> None:
        store = EmbeddingStore.open(path)
        with store.writer(ALIAS, FIELDS, {"new": 1}, {}, 8, overwrite=True) as writer:
            fill(store, writer)

    make(place.path)
    extract(place.path)
    for path in every_kill(place, overwrite):
        check_truth(path)
        overwrite(path)
        store = check_truth(path)
        assert store.provenance(ALIAS).identity == {"new": 1}
        assert (store.status(ALIAS, "image") == DONE).all()


def test_committing_rows_again_is_killed_anywhere(place: Place) -> None:
    """No row may have one field of the old commit and another field of the new one."""

    def commit(path: str, value: float) -> None:
        store = EmbeddingStore.open(path)
        with store.writer(ALIAS, FIELDS[1:], IDENTITY, {}, 8) as writer:
            tokens = np.full((8, 3, 2), value, "float32")
            arrays = {"text_tokens": tokens, "text_mask": np.full((8, 3), value > 0)}
            writer.commit(0, "text", range(8), arrays)

    make(place.path)
    commit(place.path, 0)
    for path in every_kill(place, lambda path: commit(path, 1)):
        store = EmbeddingStore.open(path)
        tokens, mask = store[f"{ALIAS}/text_tokens"], store[f"{ALIAS}/text_mask"]
        rows = np.flatnonzero(tokens.done)
        assert len(rows) in (0, 8)
        np.testing.assert_array_equal(tokens.take(rows)[:, :, 0] > 0, mask.take(rows))


def test_replacing_label_texts_is_killed_anywhere(place: Place) -> None:
    def write(path: str, count: int) -> None:
        store = EmbeddingStore.open(path)
        with store.writer(ALIAS, FIELDS[:1], IDENTITY, {}, 8) as writer:
            writer.write_label_text(LABELS[:count], np.full((count, 2), count), "{label}")

    make(place.path)
    write(place.path, 3)
    for path in every_kill(place, lambda path: write(path, 2)):
        found = EmbeddingStore.open(path).label_text(ALIAS)
        assert found is None or (found[1] == len(found[0])).all()
        write(path, 2)
        found = EmbeddingStore.open(path).label_text(ALIAS)
        assert found is not None
        assert found[0] == LABELS[:2]


def test_leftovers_are_cleaned_by_the_next_writer(tmp_path: Path) -> None:
    place = Place(tmp_path)
    make(place.path)
    left = 0
    for path in every_kill(place, extract):
        left += len(list(Path(path).rglob("*.tmp")))
        extract(path)
        store = EmbeddingStore.open(path)
        store.sync(samples_table(range(10)), label_set=LABELS, task="multilabel", source=SOURCE)
        assert list(Path(path).rglob("*.tmp")) == []
    assert left > 10
