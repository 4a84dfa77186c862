"""Dividing samples: stable by hash, balanced by stratification."""

import numpy as np
import pytest

from mmc.extract.sources import SourceOptions, read_source
from mmc.extract.sources.splits import by_hash, parse_split_by, stratified

SHARES = (0.8, 0.1, 0.1)


def test_hash_gives_the_shares_and_is_stable():
    ids = [f"{n}.jpg" for n in range(20_000)]
    splits = by_hash(ids, SHARES)
    assert np.bincount(splits) / len(ids) == pytest.approx(SHARES, abs=0.01)
    more = by_hash(["new", *ids[::-1]], SHARES)
    assert (more[1:][::-1] == splits).all()
    # A sample that is val with 10 % stays val with 20 %: only train is cut into.
    wider = by_hash(ids, (0.7, 0.2, 0.1))
    assert (wider[splits == 2] == 2).all()
    # Fixed for good: a changed hash would move samples of every store between splits.
    assert by_hash([str(n) for n in range(16)], SHARES).tolist() == HASHED


HASHED = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 2, 0, 0, 0]


def test_stratified_divides_every_label():
    rng = np.random.default_rng(1)
    rates = np.array([0.5, 0.2, 0.05, 0.02])
    hot = rng.random((3000, 4)) < rates
    labels = [np.flatnonzero(row).tolist() for row in hot]
    splits = stratified(labels, SHARES)
    assert np.bincount(splits).tolist() == pytest.approx([2400, 300, 300], abs=3)
    for label in range(4):
        counts = np.bincount(splits[hot[:, label]], minlength=3)
        assert counts == pytest.approx(np.array(SHARES) * hot[:, label].sum(), abs=1.5)
    assert (stratified(labels, SHARES) == splits).all()


def test_stratified_keeps_an_empty_share_empty():
    splits = stratified([[0], [0], [1], []], (0.5, 0.0, 0.5))
    assert set(splits.tolist()) == {0, 2}


@pytest.mark.parametrize("method", ["hash", "stratified"])
def test_only_train_is_divided(tmp_path, method):
    train = "".join(f"{n},x,{n % 3}\n" for n in range(300))
    (tmp_path / "train.csv").write_text("id,text,label\n" + train)
    (tmp_path / "test.csv").write_text("id,text\na,x\nb,y\n")
    samples = read_source(str(tmp_path), SourceOptions(split_by=f"{method}:0.8,0.2"))
    splits = np.array(samples.table["split"].to_pylist())
    assert splits[-2:].tolist() == ["test", "test"]
    assert (splits == "test").sum() == 2
    assert (splits == "val").sum() == pytest.approx(60, abs=20)
    assert any("300 train rows divided by" in note for note in samples.notes)


def test_parse():
    assert parse_split_by("hash:0.8,0.2") == ("hash", (0.8, 0.2))
    assert parse_split_by("stratified:0.7,0.2,0.1") == ("stratified", (0.7, 0.2, 0.1))
