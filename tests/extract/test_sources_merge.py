"""--merge-labels: rules, names, what becomes of the task and of the order."""

import pytest

from mmc.extract.sources import SourceOptions, read_source
from mmc.extract.sources.merge import merging, parse_merge
from mmc.store.errors import InputError


def read(tmp_path, cells, merge, header="label", **options):
    path = tmp_path / "t.csv"
    rows = "".join(f'{n},"{cell}"\n' for n, cell in enumerate(cells))
    path.write_text(f"text,{header}\n{rows}", encoding="utf-8")
    return read_source(str(path), SourceOptions(merge_labels=merge, **options))


def named(samples):
    return [
        None if cell is None else [samples.label_set[at] for at in cell]
        for cell in samples.table["labels"].to_pylist()
    ]


def test_several_rules_make_a_binary_task(tmp_path):
    cells = ["Racist", "NotHate", "Sexist", "NotHate", ""]
    samples = read(tmp_path, cells, "racist,sexist=hate;nothate=ok")
    assert samples.label_set == ("hate", "ok")
    assert named(samples) == [["hate"], ["ok"], ["hate"], ["ok"], None]
    assert samples.task == "binary"
    assert "labels: 3 merged, 2 left" in samples.notes
    assert samples.source["options"]["merge_labels"] == "racist,sexist=hate;nothate=ok"


def test_some_labels_stay_and_one_may_be_joined(tmp_path):
    samples = read(tmp_path, ["a", "b", "c", "d"], " b , c = a ")
    assert samples.label_set == ("a", "d")
    assert named(samples) == [["a"], ["a"], ["a"], ["d"]]


def test_a_sample_with_several_of_the_labels_has_the_new_one_once(tmp_path):
    samples = read(tmp_path, ["a|b", "c|d", "a|c|d"], "a,b=x;c=10")
    assert samples.label_set == ("10", "d", "x")
    assert named(samples) == [["x"], ["10", "d"], ["10", "d", "x"]]
    assert samples.task == "multilabel"


def test_the_task_is_recognised_again(tmp_path):
    cells = ["a|b", "c|d", "b"]
    assert read(tmp_path, cells, "a,b=x;c,d=y").task == "binary"
    assert read(tmp_path, cells, "a,b=x;c,d=y", task="multilabel").task == "multilabel"
    # A sample without any label is no sample of a single-label task.
    assert read(tmp_path, [*cells, ""], "a,b=x;c,d=y").task == "multilabel"
    assert read(tmp_path, ["a", "b", "c"], "a=x").task == "multiclass"


def test_names_with_the_signs_in_them(tmp_path):
    cells = ["a, b", "c=d", "e:f"]
    samples = read(tmp_path, cells, '{"x": ["a, b", "c=d"], "y z": ["e:f"]}')
    assert (samples.label_set, samples.task) == (("x", "y z"), "binary")
    rules = parse_merge('{"x": ["a, b", "c=d"]}')
    assert merging(rules, ["a, b", "c=d", "z"]) == {"a, b": "x", "c=d": "x"}
    assert parse_merge('{"x": ["a"], "x": ["b"]}') == (("a", "x"), ("b", "x"))


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ("racst=hate", "no label 'racst'; did you mean Racist"),
        ("sports=hate", "no label 'sports'; the labels are Racist, a, b, A"),
        ("racist", "cannot read merge-labels 'racist'"),
        ("=x", "cannot read merge-labels '=x'"),
        ("a=", "cannot read merge-labels 'a='"),
        ("a=x;a=y", "'a' is in two places"),
        ("Racist=x;racist=y", "'racist' is 'Racist', which another rule has"),
        ("B,racist=x;A=y", None),
        ("{1", "is not JSON"),
        ('{"x": "a"}', "as JSON must be"),
    ],
)
def test_rules_that_are_refused(merge, message):
    names = ("Racist", "a", "b", "A")
    if message is None:
        assert merging(parse_merge(merge), names) == {"b": "x", "Racist": "x", "A": "y"}
        return
    with pytest.raises(InputError, match=message) as error:
        merging(parse_merge(merge), names)
    assert "\n" not in str(error.value)


def test_a_name_that_may_be_two_labels():
    with pytest.raises(InputError, match="may be aa or Aa; write it exactly"):
        merging(parse_merge("AA=x"), ("aa", "Aa"))
    assert merging(parse_merge("Aa=x"), ("aa", "Aa")) == {"Aa": "x"}


def test_unlabelled_data_have_nothing_to_merge(tmp_path):
    assert read(tmp_path, ["", ""], "a=b").task == "unlabelled"
    assert read(tmp_path, ["a", "b"], "").label_set == ("a", "b")


def test_data_to_predict_may_lack_labels(tmp_path):
    options = {"need_merged_labels": False}
    samples = read(tmp_path, ["a", "c", "a"], "a,b=x;d=y", **options)
    assert samples.label_set == ("c", "x")
    with pytest.raises(InputError, match="no label 'b'"):
        read(tmp_path, ["a", "c", "a"], "a,b=x;d=y")
