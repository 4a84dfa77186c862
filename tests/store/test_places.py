"""Where a store may be: paths and URLs."""

import os
from pathlib import Path

import pytest

from mmc.store import EmbeddingStore
from mmc.store.errors import InputError
from mmc.store.files import open_files
from mmc.store.testing import LABELS, SOURCE, samples_table


def create(path: str) -> EmbeddingStore:
    return EmbeddingStore.create(
        path, samples_table(range(2)), label_set=LABELS, task="multilabel", source=SOURCE
    )


@pytest.mark.parametrize(
    ("typed", "lies"),
    [
        ("plain", "work/plain"),
        ("deep/er/", "work/deep/er"),
        ("./a/../b", "work/b"),
        ("with space", "work/with space"),
        ("ünï/日本", "work/ünï/日本"),
        ("a:b", "work/a:b"),
        ("C:\\stores\\clip", "work/C:\\stores\\clip"),
        ("x#y?z%20", "work/x#y?z%20"),
        ("-dash", "work/-dash"),
        ("~/mine", "home/mine"),
        ("~nobody-is-called-so/x", "work/~nobody-is-called-so/x"),
        ("file://{base}/url here/", "url here"),
        ("file://{base}/pct%20x#h", "pct%20x#h"),
        ("file://~/url", "home/url"),
        ("local://{base}/local", "local"),
    ],
)
def test_paths_lie_where_they_say(
    typed: str, lies: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("work", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    create(typed.replace("{base}", str(tmp_path)))
    found = [path.parent for path in tmp_path.rglob("samples.parquet")]
    assert found == [tmp_path / lies]
    assert len(EmbeddingStore.open(typed.replace("{base}", str(tmp_path)))) == 2


@pytest.mark.parametrize(
    ("typed", "right"),
    [
        ("file:/stores/x", "file:///stores/x"),
        ("memory:/x", "memory://x"),
        ("s3:bucket/x", "s3://bucket/x"),
        ("gs:/bucket/x", "gs://bucket/x"),
    ],
)
def test_a_url_with_a_slash_too_few_is_no_folder(typed: str, right: str) -> None:
    with pytest.raises(InputError, match=f"a slash too few; write {right}$"):
        open_files(typed)


@pytest.mark.parametrize("typed", ["", " "])
def test_an_empty_path(typed: str) -> None:
    with pytest.raises(InputError, match="path of the store is empty"):
        EmbeddingStore.open(typed)


def test_a_protocol_that_nobody_knows() -> None:
    with pytest.raises(InputError, match="cannot open foo://x/y: Protocol not known: foo"):
        EmbeddingStore.open("foo://x/y")


def test_a_name_that_is_not_utf_8(tmp_path: Path):
    """Old archives hold such names; Arrow and JSON cannot."""
    broken = os.fsdecode(b"caf\xe9")
    with pytest.raises(InputError, match="is not UTF-8"):
        create(str(tmp_path / broken))
    with pytest.raises(InputError, match=r"holds a name that is not UTF-8: '/data/caf"):
        EmbeddingStore.create(
            tmp_path / "store",
            samples_table(range(2)),
            label_set=LABELS,
            task="multilabel",
            source={**SOURCE, "image_root": f"/data/{broken}"},
        )
    assert list(tmp_path.iterdir()) == []
