"""Which features feed a head, and which rows train, validate and test it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from mmc.heads import splits
from mmc.heads.features import resolve
from mmc.heads.models.linear import Linear
from mmc.heads.models.router import Router
from mmc.heads.models.zero_shot import ZeroShot
from mmc.store import EmbeddingStore, FieldSpec, holdout
from mmc.store.errors import InputError

FIELDS = {
    "clip": {"image": (8,), "text": (8,), "image_tokens": (4, 6)},
    "dino": {"image": (5,)},
}


def make_store(
    path: Path,
    split: list[str],
    *,
    labels: list | None = None,
    ids: list[str] | None = None,
    fields: dict | None = None,
    label_text: tuple[str, ...] = (),
    done: list[int] | None = None,
) -> EmbeddingStore:
    n = len(split)
    labels = labels if labels is not None else [[i % 2] for i in range(n)]
    table = pa.table(
        {
            "id": ids or [f"s{i}" for i in range(n)],
            "split": split,
            "labels": pa.array(labels, pa.list_(pa.int32())),
            "image": ["x"] * n,
            "image_key": [f"i{i}" for i in range(n)],
            "text": ["x"] * n,
            "text_key": [f"t{i}" for i in range(n)],
        }
    )
    store = EmbeddingStore.create(
        path, table, label_set=("no", "yes"), task="multilabel", source={"spec": "x"}
    )
    for alias, shapes in (FIELDS if fields is None else fields).items():
        tower = {name: "text" if name == "text" else "image" for name in shapes}
        specs = [
            FieldSpec(name=name, shape=shape, dtype="float16", tower=tower[name])
            for name, shape in shapes.items()
        ]
        with store.writer(alias, fields=specs, identity={"a": alias}, context={}) as writer:
            for shard in range(writer.num_shards):
                rows = np.arange(*writer.bounds(shard))
                rows = rows if done is None else np.intersect1d(rows, done)
                for kind in sorted(set(tower.values())):
                    parts = {
                        name: np.ones((len(rows), *shape), np.float16)
                        for name, shape in shapes.items()
                        if tower[name] == kind
                    }
                    writer.commit(shard, kind, rows, parts, failed={})
            if alias in label_text:
                writer.write_label_text(("yes", "no"), np.eye(2, 8, dtype=np.float32), "{label}")
    return EmbeddingStore.open(path)


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return make_store(tmp_path / "store", ["train", "val"], label_text=("clip",))


# -- roles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "roles"),
    [
        ((), {"clip.image": "clip/image", "text": "clip/text", "dino.image": "dino/image"}),
        (("clip",), {"image": "clip/image", "text": "clip/text"}),
        (("clip/text",), {"text": "clip/text"}),
        (("a=clip/image", "b=dino/image"), {"a": "clip/image", "b": "dino/image"}),
        (("a=clip/image,b=dino/image",), {"a": "clip/image", "b": "dino/image"}),
        (("dino", "clip/text"), {"image": "dino/image", "text": "clip/text"}),
        (("dino", "clip/image"), {"dino.image": "dino/image", "clip.image": "clip/image"}),
    ],
)
def test_roles(store, spec, roles):
    assert resolve(store, spec, Linear, "linear") == roles


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (("clip/imago",), "no feature 'clip/imago'; it has: clip/image"),
        (("x=clip",), "no feature 'clip'"),
        (("blip",), "no such alias; it has: clip, dino"),
        (("clip/image_tokens",), "clip/image_tokens holds 4 x 6 of float16 per sample"),
        (("=clip/image",), "role=alias/field"),
        (("a=clip/image", "a=dino/image"), "a is given twice"),
        (("a=clip/image", "b=clip/image"), "clip/image is given twice"),
    ],
)
def test_features_that_cannot_be_read(store, spec, says):
    with pytest.raises(InputError, match=says):
        resolve(store, spec, Linear, "linear")


def test_the_router_needs_two_fields(store):
    assert len(resolve(store, (), Router, "router")) == 3
    with pytest.raises(InputError, match=r"router needs 2 or more fields, got 1 \(dino/image\)"):
        resolve(store, ("dino",), Router, "router")


def test_zero_shot_takes_the_image_of_the_alias_with_label_texts(store):
    assert resolve(store, (), ZeroShot, "zero_shot") == {"image": "clip/image"}
    assert resolve(store, ("clip",), ZeroShot, "zero_shot") == {"image": "clip/image"}
    assert resolve(store, ("clip/text",), ZeroShot, "zero_shot") == {"text": "clip/text"}
    with pytest.raises(InputError, match="dino has none"):
        resolve(store, ("dino",), ZeroShot, "zero_shot")
    with pytest.raises(InputError, match="at most 1 field"):
        resolve(store, ("clip/image", "clip/text"), ZeroShot, "zero_shot")


def test_zero_shot_reads_texts_where_the_backbone_reads_no_images(tmp_path):
    fields = {
        "minilm": {"text": (8,), "text_tokens": (4, 6)},
        "dino": {"image": (8,)},
    }
    store = make_store(tmp_path / "s", ["train", "val"], fields=fields, label_text=("minilm",))
    for spec in ((), ("minilm",), ("minilm/text",)):
        assert resolve(store, spec, ZeroShot, "zero_shot") == {"text": "minilm/text"}
    with pytest.raises(InputError, match="dino has none; extract with a backbone that reads texts"):
        resolve(store, ("dino/image",), ZeroShot, "zero_shot")


def test_zero_shot_reads_only_what_shares_the_space_of_the_label_texts(tmp_path):
    fields = {"blip": {"image": (8,), "text": (8,), "fused": (8,), "image_class": (8,)}}
    store = make_store(tmp_path / "s", ["train", "val"], fields=fields, label_text=("blip",))
    assert resolve(store, (), ZeroShot, "zero_shot") == {"image": "blip/image"}
    assert resolve(store, ("blip",), ZeroShot, "zero_shot") == {"image": "blip/image"}
    for name in ("fused", "image_class"):
        with pytest.raises(InputError, match=f"blip/{name} is not in their space; choose"):
            resolve(store, (f"blip/{name}",), ZeroShot, "zero_shot")


def test_scores_are_no_embeddings_but_can_be_asked_for(tmp_path):
    fields = {"blip": {"fused": (8,), "itm": (1,)}, "rcnn": {"image": (8,), "region_scores": (36,)}}
    store = make_store(tmp_path / "s", ["train", "val"], fields=fields)
    pooled = {"fused": "blip/fused", "image": "rcnn/image"}
    assert resolve(store, (), Linear, "linear") == pooled
    assert resolve(store, ("blip", "rcnn"), Linear, "linear") == pooled
    assert resolve(store, ("blip/itm",), Linear, "linear") == {"itm": "blip/itm"}


def test_zero_shot_asks_which_where_several_have_label_texts(tmp_path):
    fields = {"clip": {"image": (8,)}, "siglip": {"image": (8,)}}
    store = make_store(
        tmp_path / "s", ["train", "val"], fields=fields, label_text=("clip", "siglip")
    )
    with pytest.raises(InputError, match="clip, siglip have label texts: choose"):
        resolve(store, (), ZeroShot, "zero_shot")


def test_stores_without_what_a_head_needs(tmp_path):
    empty = make_store(tmp_path / "a", ["train"], fields={})
    with pytest.raises(InputError, match="no features yet; run `mmc extract`"):
        resolve(empty, (), Linear, "linear")
    tokens = make_store(tmp_path / "b", ["train"], fields={"clip": {"image_tokens": (4, 6)}})
    with pytest.raises(InputError, match="no pooled field"):
        resolve(tokens, (), Linear, "linear")
    with pytest.raises(InputError, match="clip has no pooled field"):
        resolve(tokens, ("clip",), Linear, "linear")


# -- rows ------------------------------------------------------------------------------------------

CLIP = ("clip/image",)


def test_rows_are_labelled_and_done(tmp_path):
    split = ["train", "train", "train", "val", "val", "test", ""]
    labels = [[0], None, [1], [0], [0, 1], None, [1]]
    store = make_store(tmp_path / "s", split, labels=labels, done=[0, 1, 3, 4, 5, 6])
    chosen = splits.choose(store, CLIP, trains=True)
    assert chosen.train.tolist() == [0]
    assert chosen.val.tolist() == [3, 4]
    assert chosen.test.tolist() == []
    assert chosen.notes == [
        "warning: 1 of 3 train rows are not embedded yet and are left out; finish `mmc extract`",
        "train: 1 without labels of 3 rows are left out",
    ]
    assert splits.targets(store, chosen.val).tolist() == [[1, 0], [1, 1]]


def test_without_val_a_tenth_is_held_out_by_the_id(tmp_path):
    ids = [f"id{i}" for i in range(600)]
    small = make_store(tmp_path / "a", ["train"] * 300 + ["test"] * 10, ids=ids[:310])
    chosen = splits.choose(small, CLIP, trains=True)
    assert 15 <= len(chosen.val) <= 45
    assert len(chosen.val) + len(chosen.train) == 300
    assert len(np.intersect1d(chosen.train, chosen.val)) == 0
    assert "no val split" in chosen.notes[0]
    assert f"{len(chosen.val)} of 300 training rows" in chosen.notes[0]
    # More samples, in another order: who was held out before still is.
    order = np.random.default_rng(0).permutation(600)
    large = make_store(tmp_path / "b", ["train"] * 600, ids=[ids[i] for i in order])
    later = {ids[order[row]] for row in splits.choose(large, CLIP, trains=True).val}
    assert {ids[row] for row in chosen.val} == later & set(ids[:300])


def test_samples_of_one_picture_are_held_out_together():
    ids = pa.chunked_array([[f"s{i}" for i in range(400)]])
    pictures = pa.chunked_array([[f"p{i // 4}" if i % 4 else None for i in range(400)]])
    rows = np.arange(400)
    held = holdout.held_out(holdout.names_of(ids, pictures, rows))
    by_picture = held.reshape(100, 4)[:, 1:]
    assert (by_picture.all(1) | ~by_picture.any(1)).all()
    assert 0 < by_picture.any(1).sum() < 30
    # Asked of fewer rows, the same ones are held out.
    some = rows[::3]
    again = holdout.held_out(holdout.names_of(ids, pictures, some))
    assert (again == held[some]).all()
    # Whatever is alone in having its picture goes by its id.
    alone = pa.chunked_array([[f"p{i}" for i in range(400)]])
    assert holdout.names_of(ids, alone, rows) == ids.to_pylist()


@pytest.mark.parametrize("names", [["a", "a", "b"], ["a", "b", "b"], ["c", "c"], ["x", "y"]])
def test_few_names_leave_both_sides_something(names):
    held = holdout.held_out(names)
    assert held.any()
    assert not held.all()


def test_of_few_names_more_can_be_asked():
    names = [f"s{i}" for i in range(6)]
    one, two = holdout.held_out(names), holdout.held_out(names, least=2)
    assert (int(one.sum()), int(two.sum())) == (1, 2)
    assert two[one].all()  # those of the smaller number are among them
    assert int(holdout.held_out(names[:2], least=2).sum()) == 1
    many = [f"s{i}" for i in range(300)]
    assert (holdout.held_out(many, least=2) == holdout.held_out(many)).all()


def test_two_rows_are_enough_to_hold_one_out(tmp_path):
    chosen = splits.choose(make_store(tmp_path / "s", ["train"] * 2), CLIP, trains=True)
    assert (len(chosen.train), len(chosen.val)) == (1, 1)


def test_val_rows_without_labels_cannot_validate(tmp_path):
    labels = [[i % 2] for i in range(20)] + [None, None]
    store = make_store(tmp_path / "s", ["train"] * 20 + ["val"] * 2, labels=labels)
    chosen = splits.choose(store, CLIP, trains=True)
    assert len(chosen.val) > 0
    assert set(chosen.val) <= set(range(20))
    assert any("no usable val rows" in note for note in chosen.notes)


def test_rows_without_any_split_train(tmp_path):
    chosen = splits.choose(make_store(tmp_path / "s", [""] * 20), CLIP, trains=True)
    assert len(chosen.train) + len(chosen.val) == 20
    assert "rows without a split are used for training" in chosen.notes[0]


@pytest.mark.parametrize(
    ("split", "labels", "done", "says"),
    [
        (["test"] * 3, None, None, "nothing to train on: no rows"),
        (["train"] * 3, None, [], "3 rows, none with clip/image"),
        (["train"] * 3, [None] * 3, None, "none of them labelled"),
        (["train"], None, None, "nothing to validate on: no rows, and too few training rows"),
    ],
)
def test_empty_splits(tmp_path, split, labels, done, says):
    store = make_store(tmp_path / "s", split, labels=labels, done=done)
    with pytest.raises(InputError, match=says):
        splits.choose(store, CLIP, trains=True)
    splits.choose(store, CLIP, trains=False)


def test_an_extraction_that_never_came_to_val(tmp_path):
    """A tenth of train would stand in for it, and the figures would mean something else."""
    store = make_store(tmp_path / "s", ["train"] * 20 + ["val"] * 5, done=list(range(20)))
    with pytest.raises(InputError, match=r"none of the 5 val samples .* is embedded yet"):
        splits.choose(store, CLIP, trains=True)


def test_single_label_targets_are_class_indices(make_store: Callable):
    for task in ("binary", "multiclass"):
        store = make_store(task, name=task)
        chosen = splits.choose(store, CLIP, trains=True)
        targets = splits.targets(store, chosen.train)
        assert targets.dtype == torch.int64
        one_hot = store.labels.multi_hot(chosen.train)
        assert np.array_equal(one_hot.argmax(1), targets.numpy())


def test_the_digest_follows_rows_and_labels(tmp_path):
    def digest(name: str, labels: list) -> str:
        store = make_store(tmp_path / name, ["train", "train", "val"], labels=labels)
        return splits.digest(splits.choose(store, CLIP, trains=True), store)

    same = digest("a", [[0], [1], [0]])
    assert digest("b", [[0], [1], [0]]) == same
    assert digest("c", [[0], [0], [0]]) != same
    assert digest("d", [[0], None, [0]]) != same
