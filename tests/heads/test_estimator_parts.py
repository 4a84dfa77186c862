"""Rows that are held out, and samples made of several arrays."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from mmc.heads import Fields
from mmc.heads.arraystore import ArrayStore
from mmc.heads.classes import Classes
from mmc.heads.holdout import hold_out
from mmc.store.errors import InputError

# -- holding out -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=2, max_size=6),
    fraction=st.floats(0.05, 0.9),
    seed=st.integers(0, 5),
)
def test_each_class_gives_its_share_and_none_is_lost(counts, fraction, seed):
    targets = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    if max(counts) < 2:
        with pytest.raises(InputError, match="too few"):
            hold_out(targets if len(targets) else np.zeros(1, np.int64), fraction, seed)
        return
    held = hold_out(targets, fraction, seed)
    assert held.any()
    for label, count in enumerate(counts):
        found = held[targets == label].sum()
        assert abs(found - count * fraction) <= 1 or found == 0
        assert not count or found < count
    assert np.array_equal(held, hold_out(targets, fraction, seed))


def test_a_tenth_of_each_class_by_another_draw_for_each_seed():
    targets = np.repeat([0, 1, 2], [500, 80, 20])
    masks = [hold_out(targets, 0.1, seed) for seed in (0, 1)]
    for held in masks:
        assert [held[targets == label].sum() for label in (0, 1, 2)] == [50, 8, 2]
    assert (masks[0] != masks[1]).any()


def test_a_rare_label_is_on_both_sides():
    random = np.random.default_rng(0)
    hot = (random.random((400, 5)) < (0.5, 0.4, 0.3, 0.05, 0.05)).astype(np.int8)
    hot[random.random(hot.shape) < 0.1] = -1
    held = hold_out(hot, 0.2, 0)
    assert 70 <= held.sum() <= 90
    for label in range(5):
        share = (hot[held, label] == 1).sum() / (hot[:, label] == 1).sum()
        assert 0.1 < share < 0.35


# -- several arrays --------------------------------------------------------------------------------


def test_rows_of_all_arrays_together():
    X = Fields({"image": np.arange(12.0).reshape(6, 2), "clip/text_mask": np.eye(6, dtype=int)})
    assert X.shape == (6,)
    assert len(X) == 6
    assert list(X) == ["image", "clip/text_mask"]
    assert X["image"].dtype == np.float32
    assert X["clip/text_mask"].dtype == bool
    for rows in ([4, 1], np.array([4, 1]), np.array([0, 1, 0, 0, 1, 0], bool), slice(1, 5, 3)):
        assert sorted(X[rows]["image"][:, 0]) == [2, 8]
    assert X[3]["image"].tolist() == [[6, 7]]
    with pytest.raises(InputError, match="X has no 'text'; it has: image, clip/text_mask"):
        X["text"]
    train, test = train_test_split(X, test_size=2, random_state=0)
    assert (len(train), len(test)) == (4, 2)
    assert isinstance(train, Fields)
    assert "image (6, 2)" in repr(X)


def test_arrays_of_other_libraries_and_types():
    half = np.ones((3, 2), np.float16)
    X = Fields({"a": half, "b": torch.ones(3, 2, dtype=torch.float64), "c": [[1, 2]] * 3})
    assert X["a"] is half
    assert X["b"].dtype == np.float32
    assert X["c"].dtype.kind == "i"


def test_what_is_read_of_arrays_never_writes_to_them():
    values = np.ones((5, 2), np.float32)
    values.flags.writeable = False
    store = ArrayStore(Fields({"image": values}))
    for rows in (slice(0, 3), np.array([0, 2])):
        taken = store["arrays/image"].take(rows)
        taken += 1
    assert (values == 1).all()


# -- y ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "task", "values"),
    [
        ([3, 1, 3], "binary", [1, 3]),
        ([-1, 1, -1], "binary", [-1, 1]),
        ([True, False, True], "binary", [False, True]),
        (["b", "a", "c"], "multiclass", ["a", "b", "c"]),
        ([2.0, 0.0, 1.0], "multiclass", [0.0, 1.0, 2.0]),
        ([[0, 1], [1, -1], [0, 0]], "multilabel", [0, 1]),
    ],
)
def test_classes_of_any_type_there_and_back(y, task, values):
    classes, targets = Classes.learn(y, 3)
    assert classes.task == task
    assert classes.values.tolist() == values
    again = Classes.from_json(task, classes.to_json())
    assert again.values.dtype == classes.values.dtype
    assert np.array_equal(again.encode(y, 3), targets)
    hot = targets == 1 if task == "multilabel" else np.eye(len(values), dtype=bool)[targets]
    expected = np.asarray(y) == 1 if task == "multilabel" else np.asarray(y)
    assert np.array_equal(again.decode(hot), expected)
