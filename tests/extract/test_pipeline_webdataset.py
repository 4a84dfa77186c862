"""Tars end to end: members are embedded as files are, once, and again only when they change."""

import os

import numpy as np
import pytest
from pipeline_case import config
from tars import jpeg, sample, write_tar

from mmc.extract.pipeline import extract
from mmc.extract.prepare import PrepareConfig, prepare
from mmc.extract.sources import SourceOptions
from mmc.store import EmbeddingStore


def run(source, store, **settings):
    said = []
    settings.setdefault("source", SourceOptions())
    result = extract(str(source), str(store), config(**settings), report=said.append)
    return result, said


def features(store):
    opened = EmbeddingStore.open(str(store))
    order = np.argsort(opened.column("text").to_pylist())
    return [np.asarray(opened[f"fake/{name}"][:])[order] for name in ("image", "text")]


@pytest.fixture
def tars(tmp_path):
    folder = tmp_path / "tars"
    for tar in range(3):
        members = {}
        for at in range(7):
            name = f"{10 * tar + at:03d}"
            members |= sample(name, 10 * tar + at, labels=[("cat", "dog")[at % 2], "all"])
        write_tar(folder / f"{tar}.tar", members)
    return folder


def test_members_are_embedded_as_files_are(tars, tmp_path):
    result, _ = run(tars, tmp_path / "a")
    assert (result.samples, result.failed) == (21, 0)
    loose = tmp_path / "loose"
    loose.mkdir()
    lines = ["id,image,text"]
    for tar in range(3):
        for n in range(10 * tar, 10 * tar + 7):
            (loose / f"{n}.jpg").write_bytes(jpeg(n))
            lines.append(f"{n},{n}.jpg,caption {n:03d}")
    (loose / "t.csv").write_text("\n".join(lines))
    run(loose / "t.csv", tmp_path / "b")
    for one, other in zip(features(tmp_path / "a"), features(tmp_path / "b"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_nothing_is_done_twice(tars, tmp_path, monkeypatch):
    run(tars / "*.tar", tmp_path / "store")
    result, said = run(tars / "*.tar", tmp_path / "store")
    assert result.embedded == 0, said
    monkeypatch.chdir(tars)
    for spec in ("*.tar", "./*.tar"):
        result, said = run(spec, tmp_path / "store")
        assert (result.samples, result.embedded) == (21, 0), said
    # Another time of change: read again, and found to hold the same.
    os.utime(tars / "1.tar", ns=(1, 1))
    result, said = run("*.tar", tmp_path / "store")
    assert result.embedded == 0, said
    # One picture more, in front of the others: their offsets move, their contents do not.
    members = sample("000", 99, labels=["new", "all"])
    for at in range(7):
        members |= sample(f"{10 + at:03d}", 10 + at, labels=["cat", "all"])
    write_tar(tars / "1.tar", members)
    result, said = run("*.tar", tmp_path / "store")
    assert result.samples == 22
    assert result.embedded == 1, said


def test_bad_members_are_counted(tars, tmp_path):
    write_tar(tars / "3.tar", {"a.jpg": jpeg(1)[:99], "b.jpg": b"", "c.jpg": jpeg(77)})
    result, said = run(tars, tmp_path / "store")
    assert (result.samples, result.failed) == (24, 2), said
    store = EmbeddingStore.open(str(tmp_path / "store"))
    failed = {row["id"]: row["reason"] for row in store.errors("fake").to_pylist()}
    assert failed["3/b"] == "an empty file"
    assert "JPEG" in failed["3/a"] or "damaged" in failed["3/a"]


def test_prepared_shards_give_the_same_features(tars, tmp_path):
    prepare(
        str(tars), str(tmp_path / "out"), PrepareConfig(shard_samples=5), report=lambda line: None
    )
    run(tars, tmp_path / "a")
    run(tmp_path / "out", tmp_path / "b")
    for one, other in zip(features(tmp_path / "a"), features(tmp_path / "b"), strict=True):
        np.testing.assert_array_equal(one, other)
    left, right = (EmbeddingStore.open(str(tmp_path / name)) for name in "ab")
    assert left.column("id").to_pylist() == right.column("id").to_pylist()
    assert left.label_set == right.label_set
