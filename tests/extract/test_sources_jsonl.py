"""JSON lines: every value as text, every fault with its line."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmc.extract.sources import SourceOptions, read_source
from mmc.extract.sources.jsonl import JsonLines
from mmc.store.errors import InputError


def read(path: Path, data: str | bytes):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return JsonLines().read(str(path), SourceOptions())


def test_values_become_text(tmp_path):
    line = (
        '{"id": "0001", "a": 1, "b": 1.0, "c": true, "d": null, "e": [1, "é"], "f": {"k": []},'
        ' "g": "1e3", "h": 12345678901234567890, "i": ""}\n'
    )
    assert read(tmp_path / "t.jsonl", line).columns.to_pylist() == [
        {
            "id": "0001", "a": "1", "b": "1.0", "c": "true", "d": None, "e": '[1, "é"]',
            "f": '{"k": []}', "g": "1e3", "h": "12345678901234567890", "i": "",
        }
    ]  # fmt: skip


def test_keys_may_come_and_go(tmp_path):
    records = read(tmp_path / "t.jsonl", '{"a": 1}\n\n{"b": 2, "a": 3}')
    assert records.columns.to_pylist() == [{"a": "1", "b": None}, {"a": "3", "b": "2"}]
    assert records.lines.tolist() == [1, 3]


def test_marks_line_ends_and_separators_inside_texts(tmp_path):
    data = '{"a": "x\u2028y\x85z"}\n'
    for encoded in (
        data.encode("utf-8-sig"),
        data.replace("\n", "\r\n").encode(),
        data.encode("utf-16"),
    ):
        assert read(tmp_path / "t.jsonl", encoded).columns["a"].to_pylist() == ["x\u2028y\x85z"]


def test_half_surrogates_are_replaced_and_counted(tmp_path):
    records = read(
        tmp_path / "t.jsonl", r'{"a": "x \ud800 y", "b": ["\udc00"], "c": "\ud83d\ude00"}'
    )
    assert records.columns.to_pylist() == [{"a": "x � y", "b": '["�"]', "c": "😀"}]
    assert "2 values held half a surrogate pair" in records.notes[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "is empty"),
        ('{"a": 1}\n{"a": 2', r"t\.jsonl:2 is not valid JSON"),
        ('{"a": 1}\n{"a": NaN}\n', r"t\.jsonl:2 .*NaN is no JSON number"),
        ('{"a": -Infinity}\n', "Infinity is no JSON number"),
        ('{"a": 1}\n\n{"a": {"b": 1, "b": 2}}\n', r"t\.jsonl:3 .*key 'b' is there twice"),
        ('[\n{"a": 1},\n', "begins a JSON array"),
        ('[{"a": 1}]', "begins a JSON array"),
        ('{"a": 1}\n"b"\n', r't\.jsonl:2 is "b", not an object'),
        ('{"a": 1}\n{}\n', r"t\.jsonl:2 is an empty object"),
        ("[" * 100_000, "JSON array"),
        ('{"a": ' * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_faults_name_the_line(tmp_path, data, message):
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path / "t.jsonl", data)
    assert "\n" not in str(error.value)


def test_one_field_may_be_missing(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"id": 1, "img": "a.png", "label": 1, "text": "x"}\n'
        '{"id": 2, "img": "a.png", "text": "no label"}\n'
        '{"id": 3, "label": 0, "text": "no image"}\n'
        '{"id": 4, "img": "a.png", "label": 0}\n'
    )
    samples = read_source(str(path))
    table = samples.table
    assert table["labels"].to_pylist() == [[1], None, [0], [0]]
    assert table["image"].to_pylist() == ["a.png", "a.png", None, "a.png"]
    assert table["text"].to_pylist() == ["x", "no label", "no image", None]
    assert samples.source["form"] == "hateful-memes"
    with path.open("a") as file:
        file.write('{"img": "a.png", "label": 0, "text": "x"}\n')
    with pytest.raises(InputError, match=r"t\.jsonl:5 has an empty id"):
        read_source(str(path))


def test_ids_are_told_apart_by_type(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"id": {one}, "text": "x"}}\n' for one in ('"0001"', "1", "1.0")))
    assert read_source(str(path)).table["id"].to_pylist() == ["0001", "1", "1.0"]


@settings(max_examples=100, deadline=None)
@given(data=st.text(alphabet='{}[]":,a1 \n\\u', max_size=40) | st.binary(max_size=40))
def test_anything_is_read_or_refused_in_one_line(data):
    with tempfile.TemporaryDirectory() as folder:
        message = ""
        try:
            records = read(Path(folder, "t.jsonl"), data)
        except InputError as error:
            message = str(error)
        else:
            assert len(records.lines) == records.columns.num_rows > 0
        assert "\n" not in message
