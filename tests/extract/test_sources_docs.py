"""docs/labels-and-tables.md names only what there is."""

import dataclasses
import re
from pathlib import Path

from mmc.extract.sources import SourceOptions
from mmc.extract.sources.labels import MARKERS
from mmc.extract.sources.merge import parse_merge
from mmc.extract.sources.saved_dataset import parse

PAGE = (Path(__file__).parents[2] / "docs" / "labels-and-tables.md").read_text(encoding="utf-8")


def test_its_options_are_there():
    named = {name.replace("-", "_") for name in re.findall(r"--([a-z][a-z-]+)", PAGE)}
    assert named <= {field.name for field in dataclasses.fields(SourceOptions)}
    assert {"merge_labels", "missing_labels", "label_level", "ties", "dedupe"} <= named


def test_its_examples_are_read():
    for rules in re.findall(r'--merge-labels "([^"]+)"', PAGE):
        assert parse_merge(rules)
    assert parse_merge(re.search(r"`'(\{.*?\})'`", PAGE)[1]) == (
        ("racist", "hate"),
        ("a, b", "hate"),
    )
    specs = re.findall(r"^(hf-dataset:\S+)", PAGE, re.MULTILINE)
    assert [parse(spec) for spec in specs] == [
        ("owner/name", None, None),
        ("owner/name", None, ["train"]),
        ("owner/name", "config", ["train"]),
        ("./folder", None, ["train"]),
    ]
    assert {"NA", "N/A", "None", "null", "nan"} <= MARKERS
