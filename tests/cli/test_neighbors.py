"""`mmc neighbors`: by a sample, by a picture, by a text."""

import pytest


def test_by_sample(mmc, trained):
    store, _ = trained
    result = mmc("neighbors", store, "--query", "s3", "-k", 4)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert len(lines) == 5
    assert lines[0].split() == ["cosine", "id", "labels", "image", "text"]
    assert not any(line.split()[2] == "s3" for line in lines[1:])
    assert "nearest by id: flat index of 100 x clip/image" in result.err


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
    across = mmc("neighbors", store, "--query", "a bright day, outside", "--json").json()
    assert (across["by"], across["feature"]) == ("text", "clip/image")


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
