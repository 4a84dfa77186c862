"""`mmc labels`: files that other tools read, a page without a network, stores of all kinds."""

import csv
import json
import os
import re
import shutil
import subprocess
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from labels_case import store_of

from mmc.heads.labels import size

TABLES = ("nearest_labels", "samples", "suspects", "duplicates", "to_label", "outliers")
VOID = {"meta", "link", "br", "img"}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


class Checked(HTMLParser):
    """Collects addresses and pictures; every element is closed in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.pictures = 0
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        found = dict(attrs)
        self.addresses += [found[key] for key in ("src", "href") if key in found]
        if tag == "img":
            self.pictures += 1
            assert found["alt"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(path: Path) -> Checked:
    page = Checked()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert all(re.match(r"data:|#|[a-z_]+\.", address) for address in page.addresses)
    return page


@pytest.fixture(scope="module")
def analysed(tmp_path_factory, trained):
    from mmc.cli import app

    out = tmp_path_factory.mktemp("labels") / "out"
    store, run = trained
    app(["labels", str(store), "--run", str(run), "--out", str(out)], standalone_mode=False)
    return out


def test_what_is_written(analysed):
    assert {p.name for p in analysed.iterdir()} == {
        *(f"{name}.csv" for name in TABLES),
        "label_graph.graphml",
        "label_graph.json",
        "index.html",
    }
    samples = read(analysed / "samples.csv")
    assert len(samples) == 100
    assert {row["run_trained_on_it"] for row in samples if row["split"] == "train"} == {"1"}
    assert {row["run_trained_on_it"] for row in samples if row["split"] != "train"} == {"0"}
    assert {row["labelled"] for row in samples} == {"1"}
    for row in read(analysed / "suspects.csv"):
        assert 0 <= float(row["score"]) <= 1
        assert row["evidence"] in ("leave-one-out", "leave-one-out + run", "run")
    assert {row["view"] for row in read(analysed / "nearest_labels.csv")} >= {"text", "centroid"}
    texts = [row for row in read(analysed / "duplicates.csv") if row["kind"] == "text"]
    assert {row["text"] for row in texts} == {"a bright day, outside", "a day\nlike others"}
    assert {row["leak"] for row in texts} == {"1"}
    assert len(json.loads((analysed / "label_graph.json").read_text())["nodes"]) == 3


def test_the_page_has_pictures_and_needs_nothing(analysed):
    page = check_page(analysed / "index.html")
    assert 0 < page.pictures <= 60


def test_json_and_writing_again(mmc, trained, tmp_path):
    found = mmc("labels", trained[0], "--out", tmp_path / "out", "--json", "--limit", 3)
    assert found.code == 0, found.err
    told = found.json()
    assert (told["samples"], told["labelled"], told["labels"]) == (100, 100, 3)
    assert all(count <= 3 for count in told["suspects"].values())
    scores = [float(row["score"]) for row in read(tmp_path / "out" / "suspects.csv")]
    assert told["likely"] == sum(score >= 0.5 for score in scores)
    again = mmc("labels", trained[0], "--out", tmp_path / "out", "--features", "clip/text")
    assert again.code == 0, again.err
    assert "100, 100 labelled, by clip/text" in " ".join(again.out.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--near", "1.5"], "--near must be a cosine in (0, 1]"),
        (["--limit", "0"], "--limit must be 1 or more"),
        (["--features", "clip/nothing"], "no feature 'clip/nothing'"),
        (["--run", "nothing.run"], "nothing.run"),
    ],
)
def test_bad_input_is_one_line(mmc, trained, tmp_path, arguments, said):
    result = mmc("labels", trained[0], "--out", tmp_path / "out", *arguments)
    assert result.code == 2
    assert said in result.error
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_content_is_left_alone(mmc, trained, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = mmc("labels", trained[0], "--out", tmp_path)
    assert result.code == 2
    assert "holds other content (notes.txt)" in result.error


def test_nothing_is_left_of_what_did_not_end(mmc, trained, tmp_path, monkeypatch):
    """Stopped late, and a disk that is full: what was there before stays whole."""
    out = tmp_path / "deep" / "out"
    first = mmc("labels", trained[0], "--out", out)
    assert first.code == 0, first.err
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    from mmc.heads.labels import analysis

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(analysis, "page", stop)
        assert mmc("labels", trained[0], "--out", out, "--limit", 1).code == 130

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(analysis, "write_table", full)
        failed = mmc("labels", trained[0], "--out", out, "--limit", 1)
    assert failed.code == 1
    assert f"cannot write {out}: No space left on device" in failed.error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_what_a_killed_call_left_goes_and_what_is_at_work_stays(mmc, tmp_path):
    from mmc.heads.labels.analysis import _appearing

    store_of(tmp_path / "s", np.eye(12), [[0]] * 12, "ab")
    beside = tmp_path / "there"
    with suppress(KeyboardInterrupt), _appearing(beside / "out") as at_work:
        (at_work / "half.csv").write_text("x")
        # A copy is what a killed call leaves: the same files, and nobody holds the lock.
        shutil.copytree(at_work, beside / "out.killed.partial")
        shutil.copytree(at_work, beside / "other.killed.partial")
        (beside / "out.mine.partial").mkdir()
        result = mmc("labels", tmp_path / "s", "--out", beside / "out")
        assert result.code == 0, result.err
        there = {"out", at_work.name, "other.killed.partial", "out.mine.partial"}
        assert {path.name for path in beside.iterdir()} == there
        assert (at_work / "half.csv").exists()
        raise KeyboardInterrupt
    assert not at_work.exists()


def test_a_place_that_cannot_be_written_is_said_before_any_work(
    mmc, trained, tmp_path, monkeypatch
):
    from mmc.heads.labels import analysis

    monkeypatch.setattr(analysis, "around", None)  # would fail
    (tmp_path / "file").write_text("")
    result = mmc("labels", trained[0], "--out", tmp_path / "file" / "out")
    assert result.code in (1, 2)
    assert "cannot write" in result.error


HOSTILE = (
    "=cmd|' /C calc'!A0",
    'say "hi",\nnewline',
    "</script><script>alert(1)</script>",
    "a\x00b",
)


def test_names_that_mean_something_elsewhere(mmc, tmp_path):
    """Tables hold them as they are; the page shows them as text."""
    vectors = [[1.0 + i % 4, i % 3, i % 5 + 0.1 * i] for i in range(40)]
    store_of(
        tmp_path / "s",
        vectors,
        [[i % 4, (i + i // 4) % 4] if i % 4 != (i + i // 4) % 4 else [i % 4] for i in range(40)],
        HOSTILE,
        text=[f"{HOSTILE[i % 3]} {i}" for i in range(40)],
        text_key=[f"t{i}" for i in range(40)],
    )
    result = mmc("labels", tmp_path / "s", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    page = check_page(tmp_path / "out" / "index.html")
    assert "script" not in page.tags
    near = read(tmp_path / "out" / "nearest_labels.csv")
    assert {row["label"] for row in near} == set(HOSTILE)
    assert read(tmp_path / "out" / "samples.csv")[2]["labels"].startswith(HOSTILE[2])


@pytest.mark.parametrize("kind", ["unlabelled", "one label", "multiclass", "binary", "one sample"])
def test_stores_of_all_kinds(mmc, tmp_path, kind):
    vectors = [[1.0, i % 3, i % 5 + 0.1 * i] for i in range(30)]
    labels, names, task = {
        "unlabelled": ([None] * 30, [], "unlabelled"),
        "one label": ([[0] if i % 2 else [] for i in range(30)], ['<b>&"it\'s"'], "multilabel"),
        "multiclass": ([[i % 3] if i % 4 else None for i in range(30)], "abcd", "multiclass"),
        "binary": ([[i % 2] for i in range(30)], "01", "binary"),
        "one sample": ([[0]], "ab", "multilabel"),
    }[kind]
    store = tmp_path / "a <i>.store"
    store_of(store, vectors[: len(labels)], labels, names, task=task)
    result = mmc("labels", store, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    page = check_page(tmp_path / "out" / "index.html")
    assert page.pictures == 0
    found = {name: read(tmp_path / "out" / f"{name}.csv") for name in TABLES}
    assert len(found["samples"]) == len(labels)
    assert len(found["to_label"]) == sum(label is None for label in labels)
    assert all(
        row["kind"] == "wrong" for row in found["suspects"] if kind in ("multiclass", "binary")
    )


def test_the_folder_may_be_the_current_one_and_hold_what_viewers_leave(mmc, tmp_path, monkeypatch):
    store_of(tmp_path / "s", np.eye(8), [[0]] * 8, "ab")
    here = tmp_path / "out"
    here.mkdir()
    (here / ".DS_Store").touch()
    (here / "desktop.ini").touch()
    # What a killed process left, of the same number as ours: in a container all have one number.
    (tmp_path / f"out.{os.getpid()}.partial").mkdir()
    monkeypatch.chdir(here)
    result = mmc("labels", tmp_path / "s", "--out", ".")
    assert result.code == 0, result.err
    assert (here / "index.html").exists()
    assert len(list(here.iterdir())) == 11
    assert len(list(tmp_path.glob("out.*"))) == 1


def test_line_ends_of_texts_stay_within_their_cells(mmc, tmp_path):
    texts = ["one\rtwo", "one\ntwo", "one\r\ntwo", "plain"] * 3
    columns = {"text": texts, "text_key": ["same"] * 12}
    store_of(
        tmp_path / "s", np.random.default_rng(0).normal(size=(12, 4)), [[0]] * 12, "ab", **columns
    )
    assert mmc("labels", tmp_path / "s", "--out", tmp_path / "out").code == 0
    path = tmp_path / "out" / "duplicates.csv"
    assert [row["text"] for row in read(path)] == texts
    assert path.read_bytes().count(b"\r") == 6
    assert pd.read_csv(path).text.tolist() == texts


def test_samples_known_in_part_are_counted_beside_those_to_label(mmc, tmp_path):
    unknown = [[1]] * 4 + [[]] * 8
    store_of(tmp_path / "s", np.eye(12), [[0]] * 12, "ab", unknown_labels=unknown)
    result = mmc("labels", tmp_path / "s", "--out", tmp_path / "out")
    assert "to label    0, besides 4 samples of which single labels are not known" in result.out
    assert "4 samples of which single" in (tmp_path / "out" / "index.html").read_text()


def test_tables_that_do_not_fit_are_refused_before_any_work(mmc, tmp_path, monkeypatch):
    store_of(tmp_path / "s", np.eye(12), [[0]] * 12, "ab")
    monkeypatch.setattr(size, "WORTH_SAYING", 100)
    said = mmc("labels", tmp_path / "s", "--out", tmp_path / "out")
    assert "tables of 12 samples x 2 labels take 216 bytes of memory" in said.err
    monkeypatch.setattr(size, "free", lambda: 200)
    refused = mmc("labels", tmp_path / "s", "--out", tmp_path / "other")
    assert refused.code == 2
    assert "200 bytes are free" in refused.error
    assert not (tmp_path / "other").exists()


def browse(page: Path, profile: Path) -> str:
    """The page as a browser has it in the end."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium here")
    shown = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
            "--virtual-time-budget=2000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in shown.stderr
    return shown.stdout


def test_a_browser_shows_the_page(analysed, tmp_path):
    assert 'id="suspects"' in browse(analysed / "index.html", tmp_path)


PHONE = """<!DOCTYPE html><title></title><iframe style="width:390px"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const root = frame.contentDocument.documentElement;
  document.title = `${root.scrollWidth} of ${root.clientWidth}`;
};
frame.srcdoc = PAGE;
</script>"""


def test_a_page_of_long_names_does_not_scroll_sideways_on_a_phone(mmc, tmp_path):
    """Only tables do, in boxes of their own. A window has 500 pixels or more: a frame has fewer."""
    long = "https://example.org/" + "a_long_name_without_any_space_" * 3
    vectors = np.random.default_rng(0).normal(size=(40, 8)).repeat(2, 0)
    store_of(
        tmp_path / ("store_" + "x" * 60),
        vectors,
        [[i % 3] if i % 5 else [0, 1, 2] for i in range(80)],
        [f"{long}{i}" for i in range(3)],
        id=[f"{long}{i}" for i in range(80)],
        text=[f"{long}{i // 2}" for i in range(80)],
        text_key=[f"t{i // 2}" for i in range(80)],
        image=[f"{long}.jpg"] * 80,
    )
    result = mmc("labels", tmp_path / ("store_" + "x" * 60), "--out", tmp_path / "out")
    assert result.code == 0, result.err
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert text.count(long) > 50
    framed = PHONE.replace("PAGE", json.dumps(text).replace("</", "<\\/"))
    (tmp_path / "phone.html").write_text(framed, encoding="utf-8")
    title = re.search(r"<title>(\d+) of (\d+)</title>", browse(tmp_path / "phone.html", tmp_path))
    assert title is not None
    assert int(title[1]) == int(title[2]) <= 390
