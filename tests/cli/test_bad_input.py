"""What a user gets wrong: one clear line, exit code 2, nothing half-made."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("{tmp}/nothing.csv",), "nothing.csv"),
        (("{set}/train.csv", "--text-column", "words"), "caption"),
        (("{set}/train.csv", "--batch-size", "0"), "batch-size"),
        (("{set}/train.csv", "--batch-size", "1000000"), "8,192"),
        (("{set}/train.csv", "--text-column", ""), "--text-column is empty"),
        (("{set}/train.csv", "--split-by", "thirds"), "hash:0.8,0.1,0.1"),
        (("{set}/train.csv", "--device", "tpu"), "tpu"),
        (("{set}/train.csv", "--fields", "imago"), "image"),
        (("{set}/train.csv", "--task", "binary"), "binary"),
        (("{set}/train.csv", "--image-root", "{tmp}/none"), "none"),
    ],
)
def test_extract(mmc: Callable, dataset, backbone, tmp_path, args, says):
    source, *rest = (arg.format(tmp=tmp_path, set=dataset) for arg in args)
    result = mmc("extract", source, tmp_path / "a.store", "--backbone", backbone, *rest)
    assert result.code == 2, result.err
    assert says in result.error
    assert not (tmp_path / "a.store").exists()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("openclip:ViT-B-32/x", "open_clip"),
        ("open_clip:ViT-B-33/laion2b_s34b_b79k", "ViT-B-32"),
        ("open_clip:ViT-B-32/laion2b_s34b", "laion2b_s34b_b79k"),
        ("hf:/no/such/folder", "/no/such/folder"),
        ("nonsense", "nonsense"),
    ],
)
def test_unknown_backbone_gives_the_nearest(mmc: Callable, dataset, tmp_path, spec, says):
    result = mmc("extract", dataset, tmp_path / "a.store", "--backbone", spec)
    assert result.code == 2, result.err
    assert says in result.error
    assert not (tmp_path / "a.store").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--head", "ruoter"), "router"),
        (("--head", "linear", "--loss", "bcee"), "bce"),
        (("--head", "linear", "--batch-size", "0"), "batch-size"),
        (("--head", "linear", "--epochs", "0"), "epochs"),
        (("--head", "linear", "--features", "clip/imago"), "clip/image"),
        (("--head", "router", "--features", "image=clip/image"), "2"),
        (("--head", "linear", "--set", "head.hiden=3"), "hiden"),
        (("--head", "linear", "--set", "nonsense"), "nonsense"),
        (("--head", "linear", "--set", "lr=0.1"), "did you mean the option --lr?"),
        (("--head", "mlp", "--set", "hidden=8"), "did you mean head.hidden?"),
        (("--head", "mlp", "--set", "head.hidden=1000000000000"), "make it smaller"),
        (("--head", "linear", "--lr", "inf"), "lr"),
        (("--head", "linear", "--features", ""), "--features is empty"),
        (("--head", "linear", "--lr", "-1"), "lr"),
    ],
)
def test_train_head(mmc: Callable, trained, tmp_path, args, says):
    result = mmc("train-head", trained[0], tmp_path / "run", *args)
    assert result.code == 2, result.err
    assert says in result.error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("nowhere.store",), "no store at nowhere.store"),
        (("nowhere.store", "--head", "liner"), "did you mean linear"),
        (("nowhere.store", "--loss", "bec"), "did you mean bce?"),
        (("nowhere.store", "--set", "lr=1"), "did you mean the option --lr?"),
    ],
)
def test_what_is_wrong_at_first_sight_is_said_before_torch_is_loaded(tmp_path, args, says):
    code = (
        "import sys; from mmc.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: sys.exit(3 if 'torch' in sys.modules else stop.code)"
    )
    store, *options = args
    command = [sys.executable, "-c", code, "train-head", store, "run", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr


def test_paths_are_looked_at_before_torch_is_loaded(trained, tmp_path):
    store, run = map(str, trained)
    calls = {
        "nowhere.run does not exist": [
            ["predict", "nowhere.run", store, "--out", "p.csv"],
            ["evaluate", "nowhere.run", store],
            ["report", "nowhere.run", "--out", "r.html"],
            ["labels", store, "--run", "nowhere.run", "--out", "out"],
            ["export", "nowhere.run", "--to", "onnx"],
            ["export", store, "--to", "npy", "--run", "nowhere.run"],
        ],
        f"{store} is not a run": [["evaluate", store, store]],
        "no store at nowhere.store": [
            ["evaluate", run, "nowhere.store"],
            ["report", run, "--store", "nowhere.store", "--out", "r.html"],
            ["labels", "nowhere.store", "--out", "out"],
            ["neighbors", "nowhere.store", "--query", "x"],
            ["compare", run, "--store", "nowhere.store"],
            ["export", "nowhere.store", "--to", "npy"],
        ],
        "nowhere.csv": [["predict", run, "nowhere.csv", "--out", "p.csv"]],
    }
    code = (
        "import json, sys; from mmc.cli import main\n"
        "for arguments in json.loads(sys.stdin.read()):\n"
        "    sys.argv = ['mmc', *arguments]\n"
        "    try: main()\n"
        "    except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    flat = [arguments for listed in calls.values() for arguments in listed]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        input=json.dumps(flat),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["2 False"] * len(flat), done.stderr
    says = [text for text, listed in calls.items() for _ in listed]
    for text, line in zip(says, done.stderr.splitlines(), strict=True):
        assert text in line


def test_a_run_on_arrays_is_for_arrays(mmc: Callable, trained, tmp_path):
    from mmc.heads import HeadClassifier

    X, y = np.random.default_rng(0).normal(size=(40, 5)), np.arange(40) % 2
    run = HeadClassifier(epochs=1).fit(X, y).save(tmp_path / "run")
    for command in (
        ("predict", run, trained[0], "--out", tmp_path / "p.csv"),
        ("evaluate", run, trained[0]),
    ):
        result = mmc(*command)
        assert result.code == 2
        assert "trained on arrays" in result.error
        assert "HeadClassifier.load(RUN).predict(X)" in result.error


def test_a_label_that_is_there_twice_is_said_with_its_line(mmc: Callable, trained, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("one\n\ntwo\none\n", encoding="utf-8")
    out = ("--out", tmp_path / "p.csv")
    result = mmc("predict", trained[1], trained[0], "--labels", labels, *out)
    assert result.code == 2
    assert "labels.txt, line 4: 'one' is there twice, first in line 1" in result.error


def test_a_store_that_is_not_a_store(mmc: Callable, dataset, tmp_path):
    for command in (("info",), ("verify",), ("compact",)):
        assert mmc(*command, dataset).code == 2
    assert mmc("train-head", dataset, tmp_path / "r", "--head", "linear").code == 2
    assert str(dataset) in mmc("info", dataset).error
    assert mmc("info", tmp_path / "missing").code == 2


def test_a_format_newer_than_ours(mmc: Callable, trained, tmp_path):
    store, run = tmp_path / "s", tmp_path / "r"
    shutil.copytree(trained[0], store)
    shutil.copytree(trained[1], run)
    group = json.loads((store / "zarr.json").read_text(encoding="utf-8"))
    group["attributes"]["mmc"]["format"] = 3
    (store / "zarr.json").write_text(json.dumps(group), encoding="utf-8")
    result = mmc("info", store)
    assert result.code == 2
    assert "upgrade" in result.error
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps(record | {"format": 2}), encoding="utf-8")
    result = mmc("predict", run, trained[0], "--out", tmp_path / "p.csv")
    assert result.code == 2
    assert "upgrade" in result.error
    assert not (tmp_path / "p.csv").exists()


def test_a_run_trained_on_other_features(mmc: Callable, trained, dataset, backbone, tmp_path):
    args = ("--backbone", backbone, "--name", "clip", "--batch-size", 3)
    mmc("extract", dataset, tmp_path / "other.store", *args)
    for command in ("predict", "evaluate"):
        extra = ("--out", tmp_path / "p.csv") if command == "predict" else ()
        result = mmc(command, trained[1], tmp_path / "other.store", *extra)
        assert result.code == 2, result.err
        assert "batch_size" in result.err  # the difference, line by line
    assert not (tmp_path / "p.csv").exists()


def test_features_made_differently_are_not_mixed(
    mmc: Callable, trained, dataset, tmp_path, backbone
):
    store = tmp_path / "s"
    shutil.copytree(trained[0], store)
    before = {p: p.read_bytes() for p in (store / "features").rglob("*") if p.is_file()}
    args = ("--backbone", backbone, "--name", "clip", "--precision", "float32", "--batch-size", 5)
    result = mmc("extract", dataset, store, *args)
    assert result.code == 2, result.err
    assert "batch_size" in result.err
    assert "--overwrite" in result.err
    assert {p: p.read_bytes() for p in (store / "features").rglob("*") if p.is_file()} == before
    assert mmc("extract", dataset, store, *args, "--overwrite").code == 0


def test_empty_split(mmc: Callable, table, dataset, backbone, trained, tmp_path):
    result = mmc("evaluate", trained[1], trained[0], "--split", "dev2")
    assert result.code == 2
    assert "train" in result.error  # names the splits that there are
    result = mmc("predict", trained[1], trained[0], "--split", "x", "--out", tmp_path / "p.csv")
    assert result.code == 2
    args = ("--image-root", dataset / "images")
    only_test = table("test.csv", ("id", "image"), ("a", "0.jpg"), ("b", "1.jpg"))
    mmc("extract", only_test, tmp_path / "t.store", "--backbone", backbone, *args)
    result = mmc("train-head", tmp_path / "t.store", tmp_path / "run", "--head", "linear")
    assert result.code == 2
    assert not (tmp_path / "run").exists()


def test_label_set_that_does_not_match(mmc: Callable, table, dataset, backbone, trained, tmp_path):
    rows = [(f"x{i}", f"{i}.jpg", "a day", "cat|dog" if i % 2 else "cat") for i in range(6)]
    other = table("train.csv", ("id", "image", "caption", "labels"), *rows)
    args = ("--backbone", backbone, "--name", "clip", "--image-root", dataset / "images")
    made = mmc("extract", other, tmp_path / "s", *args)
    assert made.code == 0, made.err
    result = mmc("evaluate", trained[1], tmp_path / "s", "--split", "train")
    assert result.code == 2
    assert "cat" in result.error
    result = mmc("predict", trained[1], tmp_path / "s", "--out", tmp_path / "p.csv")
    assert result.code == 2
    assert "has other labels ('cat', 'dog' ...)" in result.error
    assert not (tmp_path / "p.csv").exists()


@pytest.mark.parametrize("command", ["extract", "train-head"])
def test_an_output_folder_with_other_content(
    mmc: Callable, trained, dataset, backbone, tmp_path, command
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious", encoding="utf-8")
    if command == "extract":
        result = mmc("extract", dataset, tmp_path / "mine", "--backbone", backbone)
    else:
        result = mmc("train-head", trained[0], tmp_path / "mine", "--head", "linear")
    assert result.code == 2, result.err
    assert "mine" in result.error
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_usage_errors_are_one_line_too(mmc: Callable):
    for args in (("extract",), ("extrakt",), ("info", "a", "--jsn"), ("list", "hats")):
        result = mmc(*args)
        assert result.code == 2, args
        assert result.error


def test_debug_shows_where_it_was_raised(mmc: Callable, tmp_path: Path):
    assert "Traceback" in mmc("--debug", "info", tmp_path / "none").err


@pytest.mark.parametrize(
    ("out", "says"), [("", "a folder"), ("{tmp}", "a folder"), ("{tmp}/p.csv.gz", "p.csv")]
)
def test_no_place_for_predictions_is_said_before_any_work(
    mmc: Callable, trained, dataset, tmp_path, out, says
):
    result = mmc("predict", trained[1], dataset / "test.csv", "--out", out.format(tmp=tmp_path))
    assert result.code == 2
    assert says in result.error
    assert "samples" not in result.err  # the source was not read
    assert list(tmp_path.iterdir()) == []
