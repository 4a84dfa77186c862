"""`mmc neighbors`: by a sample, by a picture, by a text."""

import numpy as np
import pyarrow as pa
import pytest

from mmc.store import EmbeddingStore, FieldSpec


def test_by_sample(mmc, trained):
    store, _ = trained
    result = mmc("neighbors", store, "--query", "s3", "-k", 4)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert len(lines) == 6
    assert lines[0].split() == ["cosine", "id", "labels", "image", "text"]
    assert lines[1].split()[:2] == ["query", "s3"]
    assert "3.jpg" in lines[1]
    assert "a bright day, outside" in lines[1] or "a day like others" in lines[1]
    assert [line.split()[0] for line in lines[2:]] == ["1", "2", "3", "4"]
    assert not any(line.split()[2] == "s3" for line in lines[2:])
    assert "nearest by id: flat index of 100 x clip/image" in result.err
    assert "--features searches others: clip/text" in result.err
    chosen = mmc("neighbors", store, "--query", "s3", "--features", "clip/text")
    assert "searches others" not in chosen.err


def test_a_word_that_may_be_a_wrong_id_is_said_to_be_a_text(mmc, trained):
    store, _ = trained
    assert "'s333' is the id of no sample" in mmc("neighbors", store, "--query", "s333").err
    meant = mmc("neighbors", store, "--query", "s333", "--by", "text")
    assert (meant.code, "the id of no sample" in meant.err) == (0, False)


def test_by_picture_and_by_text(mmc, trained, dataset):
    store, _ = trained
    picture = dataset / "images" / "7.jpg"
    found = mmc("neighbors", store, "--query", picture, "--json").json()
    assert found["by"] == "image"
    assert found["neighbors"][0]["id"] == "s7"
    assert found["neighbors"][0]["cosine"] > 0.999
    assert len(found["neighbors"]) == 10
    texts = mmc(
        "neighbors", store, "--query", "a bright day, outside", "--features", "clip/text", "--json"
    ).json()
    assert texts["by"] == "text"
    assert texts["neighbors"][0]["text"] == "a bright day, outside"
    assert texts["neighbors"][0]["cosine"] > 0.999
    assert texts["query"] == {"text": "a bright day, outside"}
    shown = mmc("neighbors", store, "--query", "two dogs", "-k", 1).out.splitlines()
    assert shown[1].split(maxsplit=1) == ["query", "two dogs"]
    across = mmc("neighbors", store, "--query", "a bright day, outside", "--json").json()
    assert (across["by"], across["feature"]) == ("text", "clip/image")


def test_a_sample_is_searched_by_what_it_has(mmc, tmp_path):
    """A store of texts alone, and one where a sample's picture could not be read."""
    store = EmbeddingStore.create(
        tmp_path / "s",
        pa.table({"id": ["a", "b", "c"], "text": ["one", "two", "three"], "text_key": list("xyz")}),
        label_set=(),
        task="unlabelled",
        source={"spec": "made.csv"},
    )
    values = np.array([[1, 0.1], [0.9, 0.2], [0, 1]], np.float16)
    fields = [FieldSpec(name="text", shape=(2,), dtype="float16", tower="text")]
    with store.writer("mini", fields, {}, {}) as writer:
        writer.commit(0, "text", np.arange(3), {"text": values})
    found = mmc("neighbors", store.path, "--query", "a", "--json")
    assert found.code == 0, found.err
    assert found.json()["feature"] == "mini/text"
    assert [item["id"] for item in found.json()["neighbors"]] == ["b", "c"]
    lines = mmc("neighbors", store.path, "--query", "a").out.splitlines()
    assert lines[0].split() == ["cosine", "id", "labels", "text"]
    assert lines[1].split() == ["query", "a", "?", "one"]
    fields = [FieldSpec(name="image", shape=(2,), dtype="float16", tower="image")]
    with store.writer("mini2", fields, {}, {}) as writer:
        writer.commit(0, "image", np.arange(1, 3), {"image": values[1:]}, failed={0: "broken"})
    found = mmc("neighbors", store.path, "--query", "a", "--json").json()
    assert found["feature"] == "mini/text"
    found = mmc("neighbors", store.path, "--query", "b", "--json").json()
    assert found["feature"] == "mini2/image"
    refused = mmc("neighbors", store.path, "--query", "a", "--features", "mini2/image")
    assert refused.code == 2
    assert "sample 'a' has no mini2/image" in refused.error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--query", "nothing.jpg"], "nothing.jpg: no such file"),
        (["--query", "zzz", "--by", "id"], "no sample 'zzz'"),
        (["--query", " "], "is empty"),
        (["--query", "s3", "--features", "clip/nothing"], "no feature 'clip/nothing'"),
        (["--query", "s3", "-k", "0"], "greater than or equal to 1"),
    ],
)
def test_wrong_queries_are_one_line(mmc, trained, arguments, said):
    result = mmc("neighbors", trained[0], *arguments)
    assert result.code == 2
    assert said in result.error


def test_a_file_that_is_no_picture(mmc, trained, tmp_path):
    path = tmp_path / "a.png"
    path.write_text("no picture")
    result = mmc("neighbors", trained[0], "--query", path)
    assert result.code == 2
    assert "a.png" in result.error
