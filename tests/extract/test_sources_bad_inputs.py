"""The shared corpus of bad tables: each is read as stated here, or refused in one line.

The manifest there says what is acceptable; this file says which of it we do.
"""

import csv

import pytest

from mmc.extract.sources import SourceOptions, read_source
from mmc.store.errors import InputError

OK = {"ids": ["ok_reference.jpg", "gray_L.jpg"], "labels": [["1", "3"], ["2"]]}
CAPTIONS = ["Four coloured squares.", "A gray picture."]

READ = {
    "csv/ok.csv": {**OK, "texts": CAPTIONS},
    "csv/bom.csv": {**OK, "texts": CAPTIONS},
    "csv/utf16.csv": {**OK, "texts": CAPTIONS},
    "csv/latin1.csv": {"texts": ["Café à la crème"], "warning": "line 2): read as cp1252"},
    "csv/crlf.csv": {**OK, "texts": CAPTIONS},
    "csv/cr_only.csv": {**OK, "texts": CAPTIONS},
    "csv/semicolon.csv": {**OK, "texts": CAPTIONS, "note": "separated by semicolon"},
    "csv/tabs.tsv": {**OK, "texts": CAPTIONS, "note": "separated by tab"},
    "csv/ok.csv.gz": {**OK, "texts": CAPTIONS},
    "csv/missing_labels_column.csv": {"task": "unlabelled", "labels": [None]},
    "csv/missing_caption_column.csv": {"texts": [None], "labels": [["1"]]},
    "csv/wrong_case_header.csv": {"ids": ["ok_reference.jpg"], "texts": ["x"]},
    "csv/extra_index_column.csv": {"texts": ["x", "y"], "note": "without a name left out"},
    "csv/blank_lines.csv": {**OK, "texts": CAPTIONS},
    "csv/quotes_ok.csv": {"texts": ['He said "hi", then left', "two\nlines"]},
    "csv/quotes_broken.csv": {
        "ids": ["552.jpg", "1188.jpg", "2070.jpg", "1014.jpg"],
        "texts": [
            "A yellow and blue fire hydrant that has falling into the street with"
            ' "caution" tape around it.',
            'Two apartment doors with a sign in a window reading "for rent".',
            'A bus that reads "851", is parked at the side of the road.',
            "Atop an oriental rug rests a dog and two low-lying tables and a taller one full of"
            " very tidily arranged piles of jeans and tops.",
        ],
        "warning": "4 of 4 records were malformed",
    },
    "csv/nul_byte.csv": {"texts": ["a\x00b"]},
    "csv/control_rtl_emoji.csv": {"ids": ["ok_reference.jpg"]},
    "csv/long_caption.csv": {"ids": ["ok_reference.jpg"], "text_length": 216_000},
    "csv/labels_unknown.csv": {"labels": [["1", "99"], ["-1"], ["12"]]},
    "csv/labels_messy.csv": {
        "labels": [["1", "3"], ["1", "3"], ["1"], ["1", "3"], ["1"]],
        "note": "1.0 read as 1",
    },
    "csv/labels_empty.csv": {
        "labels": [[], [], ["1"]],
        "task": "multilabel",
        "note": "2 empty cells",
    },
    "csv/labels_nan_strings.csv": {"labels": [["NA"], ["None"], ["null"]]},
    "csv/captions_empty.csv": {"texts": [None, None, None, "NA", "null"]},
    "csv/bad_images.csv": {"rows": 63},
    "csv/numeric_ids.csv": {
        "ids": ["7", "0007", "1e3", "12345678901234567890"],
        "warning": "read as texts only",
        "image_root": None,
    },
    "csv/single_label_only.csv": {"labels": [["1"], ["1"]], "warning": "label '1' is on all 2"},
    "csv/pipe_labels.csv": {
        "labels": [["Action", "Comedy"], ["Comedy"], [], ["Action", "Drama"], None],
        "note": "1 cells that hold N/A read as unlabelled",
        "texts": ["A", "B", "C", "D", "E"],
        "image_root": None,
    },
    "jsonl/ok.jsonl": {"ids": ["1", "2"], "labels": [["1"], ["0"]], "task": "binary"},
    "jsonl/missing_fields.jsonl": {
        "labels": [["1"], None, ["1"], ["0"]],
        "texts": ["good", "no label", "no img", None],
    },
    "jsonl/lone_surrogate.jsonl": {"texts": ["bad � text"], "note": "half a surrogate"},
    "jsonl/id_types.jsonl": {"ids": ["0001", "1", "1.0"]},
    "jsonl/bom_crlf_blank.jsonl": {"ids": ["1", "2"]},
}
REFUSED = {
    "csv/empty_file.csv": r"empty_file\.csv is empty",
    "csv/header_only.csv": "has a header and no rows",
    "csv/no_header.csv": "no column for images or texts .* header line missing",
    "csv/duplicate_header.csv": r"csv:1: two columns are named 'Labels'",
    "csv/unterminated_quote.csv": r"csv:2 opens a quote that is not closed",
    "csv/ragged.csv": r"csv:2 has 2 fields and the header has 3",
    "csv/duplicate_rows.csv": r"csv:4 has the id 'ok_reference\.jpg' of .*csv:2.* say the same",
    "csv/duplicate_ids_conflict.csv": r"csv:3 has the id .*csv:2.* differ",
    "csv/missing_image_files.csv": r"csv:5 has an empty id",
    "csv/path_traversal.csv": r"csv:2: image path .* leaves the image folder",
    "jsonl/broken_line.jsonl": r"jsonl:2 is not valid JSON",
    "jsonl/label_types.jsonl": r"jsonl:12: the label is an object",
    "jsonl/nan_infinity.jsonl": r"jsonl:1 .*NaN is no JSON number",
    "jsonl/duplicate_keys.jsonl": r"jsonl:1 .*key 'id' is there twice",
    "jsonl/array_not_jsonl.jsonl": r"jsonl:1 begins a JSON array",
    "jsonl/not_objects.jsonl": r"jsonl:1 is 1, not an object",
    "jsonl/duplicate_ids.jsonl": r"jsonl:2 has the id '1' of .*jsonl:1.* differ",
    "jsonl/img_traversal.jsonl": r"jsonl:1: image path .* leaves the image folder",
    "jsonl/empty.jsonl": r"empty\.jsonl is empty",
}

pytestmark = pytest.mark.shared_data


def test_every_table_of_the_manifest_is_here(shared_data):
    with open(shared_data / "bad_inputs" / "manifest.csv", newline="", encoding="utf-8") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    tables = {path for path in paths if path.startswith(("csv/", "jsonl/"))}
    assert tables == {*READ, *REFUSED}


@pytest.mark.parametrize("path", READ)
def test_read(shared_data, path):
    expected, folder = READ[path], shared_data / "bad_inputs"
    image_free = expected.get("image_root", "") is None or "quotes_broken" in path
    settings = SourceOptions(image_root=None if image_free else str(folder / "images"))
    samples = read_source(str(folder / path), settings)
    table = samples.table
    named = [
        None if cell is None else [samples.label_set[at] for at in cell]
        for cell in table["labels"].to_pylist()
    ]
    texts = table["text"].to_pylist()
    found = {
        "ids": table["id"].to_pylist(),
        "labels": named,
        "texts": texts,
        "task": samples.task,
        "rows": len(table),
        "text_length": len(texts[0] or ""),
        "image_root": samples.source["image_root"],
    }
    for key, value in expected.items():
        if key == "note":
            assert any(value in note for note in samples.notes)
        elif key == "warning":
            assert any(value in warning for warning in samples.warnings)
        else:
            assert found[key] == value


@pytest.mark.parametrize("path", REFUSED)
def test_refused(shared_data, path):
    folder = shared_data / "bad_inputs"
    with pytest.raises(InputError, match=REFUSED[path]) as error:
        read_source(str(folder / path), SourceOptions(image_root=str(folder / "images")))
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_allowed_paths_are_read_and_fail_later(shared_data):
    """URLs stay refused; files outside are the user's own business once allowed."""
    folder = shared_data / "bad_inputs"
    settings = SourceOptions(image_root=str(folder / "images"), allow_absolute_paths=True)
    with pytest.raises(InputError, match=r"csv:4: image .* is a URL"):
        read_source(str(folder / "csv" / "path_traversal.csv"), settings)
