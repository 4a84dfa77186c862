"""Which rows are computed in which batch."""

import numpy as np
import pyarrow as pa

from mmc.extract.plan import first_rows, image_batches, text_batches


def rows(batches):
    return [batch.rows.tolist() for batch in batches]


def test_first_rows_are_the_lowest_live_rows_with_the_content():
    keys = pa.chunked_array([["a", None, "b", "a"], ["b", None, "c", "a"]])
    live = np.array([True, True, False, True, True, True, True, True])
    assert first_rows(keys, live).tolist() == [0, 1, 2, 0, 4, 5, 6, 0]


def test_rows_appended_later_change_no_first_row():
    keys = ["a", "b", "a", None]
    before = first_rows(pa.chunked_array([keys]), np.ones(4, bool))
    after = first_rows(pa.chunked_array([[*keys, "b", "a"]]), np.ones(6, bool))
    assert after[:4].tolist() == before.tolist()
    assert after[4:].tolist() == [1, 0]


def test_no_keys_at_all():
    keys = pa.chunked_array([pa.array([None, None], pa.string())])
    assert first_rows(keys, np.ones(2, bool)).tolist() == [0, 1]


def test_image_batches_are_consecutive():
    found = image_batches(np.array([0, 2, 3, 7, 9]), 2)
    assert rows(found) == [[0, 2], [3, 7], [9]]
    assert image_batches(np.array([], np.int64), 2) == []


def test_text_batches_hold_one_length_each():
    found = text_batches(np.array([10, 11, 12, 13, 14]), np.array([8, 16, 8, 8, 16]), 2)
    assert rows(found) == [[10, 12], [13], [11, 14]]
    assert [batch.length for batch in found] == [8, 8, 16]


def test_texts_appended_later_move_no_earlier_one():
    buckets = np.array([8, 16, 8, 24, 16, 8])
    before = text_batches(np.arange(4), buckets[:4], 2)
    after = text_batches(np.arange(6), buckets, 2)
    place = {
        int(row): (batch.length, index, at)
        for found in (before, after)
        for index, batch in enumerate(b for b in found)
        for at, row in enumerate(batch.rows)
        if found is after
    }
    for batch in before:
        for at, row in enumerate(batch.rows):
            assert place[int(row)][0] == batch.length
            assert place[int(row)][2] == at
