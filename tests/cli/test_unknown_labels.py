"""Labels that are not known of some samples, from a table of columns to predictions."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from mmc.store import EmbeddingStore

NAMES = ("bright", "dark blue", "red")
COUNTS = {"train": 80, "val": 40, "test": 40}


def make(folder: Path, *, known: bool) -> dict[str, np.ndarray]:
    """Pictures that tell three labels, a column for each; a third of the cells is unknown.

    Where all are ``known`` the cells say what is true. Returns what each split's cells say.
    """
    (folder / "images").mkdir(parents=True)
    draw, number, said = np.random.default_rng(5), 0, {}
    for split, count in COUNTS.items():
        truth = draw.integers(0, 2, (count, 3))
        lacking = draw.random((count, 3)) < 0.35
        said[split] = np.where(lacking & (not known), -1, truth)
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "image", "caption", *NAMES])
            for row, (bright, blue, red) in enumerate(truth):
                pixels = draw.integers(0, 60, (32, 32, 3))
                pixels[..., 0] += 150 * red
                pixels[..., 2] += 60 * blue
                name = f"{number}.jpg"
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name)
                caption = "a bright day, outside" if bright else "a day like others"
                cells = [("", "-1")[number % 2] if x < 0 else x for x in said[split][row]]
                writer.writerow([f"s{number}", name, caption, *cells])
                number += 1
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("unknown") / "set"
    return path, make(path, known=False)


def test_figures_are_those_of_the_known_labels(mmc: Callable, folder, backbone, tmp_path):
    said = folder[1]
    source = shutil.copytree(folder[0], tmp_path / "set")
    store, run = tmp_path / "store", tmp_path / "run"
    extract = ("extract", source, store, "--backbone", backbone, "--name", "clip")
    extract += ("--label-column", ",".join(NAMES))
    result = mmc(*extract)
    assert result.code == 0, result.err
    unknown = sum(int((x < 0).sum()) for x in said.values())
    rows = sum(int(((x < 0).any(1) & (x >= 0).any(1)).sum()) for x in said.values())
    none = sum(int((x < 0).all(1).sum()) for x in said.values())
    assert f"{unknown - 3 * none:,} single labels of {rows} samples are unknown" in result.err
    info = mmc("info", store, "--json").json()
    assert info["partly_labelled"] == rows
    assert sum(info["unknown_labels"].values()) == unknown - 3 * none

    train = ("train-head", store, run, "--head", "linear", "--epochs", "12", "--lr", "0.02")
    result = mmc(*train, "--set", "loss.pos_weight=auto")
    assert result.code == 0, result.err
    found = mmc("evaluate", run, store, "--split", "test", "--json").json()
    out = tmp_path / "p.csv"
    result = mmc("predict", run, store, "--split", "test", "--out", out, "--scores")
    assert result.code == 0, result.err
    assert "ok    better than random" in result.out

    with out.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    p = np.array([[float(line[f"score:{name}"]) for name in NAMES] for line in lines])
    thresholds = json.loads((run / "run.json").read_text(encoding="utf-8"))["thresholds"]["values"]
    chosen = p >= np.array(thresholds)
    truth = said["test"]
    known = truth >= 0
    ap, auroc, f1 = [], [], []
    for label in range(3):
        at = known[:, label]
        yes = truth[at, label]
        ap.append(average_precision_score(yes, p[at, label]))
        auroc.append(roc_auc_score(yes, p[at, label]))
        f1.append(f1_score(yes, chosen[at, label]))
    assert found["mAP"] == pytest.approx(np.mean(ap), abs=1e-9)
    assert found["auroc_macro"] == pytest.approx(np.mean(auroc), abs=1e-9)
    assert found["macro_f1"] == pytest.approx(np.mean(f1), abs=1e-9)
    micro = f1_score(truth[known], chosen[known])
    assert found["micro_f1"] == pytest.approx(micro, abs=1e-9)
    assert found["per_label"]["positives"] == [int((truth[:, i] == 1).sum()) for i in range(3)]
    assert found["samples"] == int(known.any(1).sum())
    assert found["unknown_entries"] == int((~known[known.any(1)]).sum())

    # Labels that become known cost no extraction, and the store is as any other then.
    assert EmbeddingStore.open(store).meta.format == 2
    make(tmp_path / "known", known=True)
    for split in COUNTS:
        shutil.copy(tmp_path / "known" / f"{split}.csv", source / f"{split}.csv")
    result = mmc(*extract, "--json")
    assert result.code == 0, result.err
    assert result.json()["embedded"] == 0
    known_now = EmbeddingStore.open(store)
    assert known_now.meta.format == 1
    assert (known_now.labels.multi_hot() >= 0).all()


def test_a_sweep_and_folds_know_what_is_unknown(mmc: Callable, folder, backbone, tmp_path):
    source, said = folder
    store, run = tmp_path / "store", tmp_path / "run"
    extract = ("extract", source, store, "--backbone", backbone, "--name", "clip")
    assert mmc(*extract, "--label-column", ",".join(NAMES)).code == 0
    train = ("train-head", store, run, "--head", "linear", "--epochs", "4", "--sweep", "lr=.01,.02")
    result = mmc(*train, "--folds", "2")
    assert result.code == 0, result.err
    from mmc.heads.artifact import Run

    held = Run.load(run).out_of_fold()
    everything = np.concatenate([said["train"], said["val"]])
    rows = {f"s{number}": row for number, row in enumerate(everything)}
    assert len(held.targets) == int((everything >= 0).any(1).sum())
    for name, target in zip(held.ids.to_pylist(), held.targets.tolist(), strict=True):
        assert target == rows[name].tolist()
    result = mmc("report", run, "--store", store, "--out", tmp_path / "r.html")
    assert result.code == 0, result.err
    result = mmc("labels", store, "--run", run, "--out", tmp_path / "labels")
    assert result.code == 0, result.err
    with (tmp_path / "labels" / "suspects.csv").open(newline="", encoding="utf-8") as file:
        suspects = list(csv.DictReader(file))
    whole = np.concatenate([said[split] for split in COUNTS])
    for line in suspects:
        assert whole[int(line["id"][1:]), NAMES.index(line["label"])] >= 0
