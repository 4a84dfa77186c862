"""A run on disk: what is saved comes back, what is not a run or was changed is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmc.heads.artifact import Run
from mmc.heads.card import render
from mmc.heads.evaluate import evaluate
from mmc.heads.predict import logits
from mmc.heads.runfiles import check_output, read_history
from mmc.heads.thresholds import Thresholds
from mmc.store import EmbeddingStore
from mmc.store.errors import FingerprintMismatchError, FormatVersionError, InputError, MmcError

MakeStore = Callable[..., EmbeddingStore]
MakeRun = Callable[..., Run]


@pytest.fixture
def saved(make_store: MakeStore, make_run: MakeRun, tmp_path: Path) -> Path:
    """A saved run with everything in it."""
    counts = {
        "samples": 1060,
        "images": 1000,
        "texts": 950,
        "labelled": 1059,
        "splits": {"train": 1030, "": 30},
    }
    store = make_store(source={"counts": counts})
    run = make_run(
        store,
        thresholds=Thresholds(
            values=(0.1, 0.2, 0.3, 0.4, 0.5),
            mode="per_label",
            objective="micro",
            held_out={"global": 0.5, "per_label": 0.625},
        ),
        history=[{"epoch": 1, "loss": 0.25, "mAP": None}, {"epoch": 2, "loss": 0.125, "mAP": 0.5}],
        train_config={"lr": 1e-3},
        seed=7,
    )
    run.metrics = {split: evaluate(run, store, split) for split in ("val", "test")}
    run.save(tmp_path / "run")
    return tmp_path / "run"


def edit(path: Path, **changes: Any) -> None:
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**record, **changes}))


def test_round_trip(saved: Path, make_store: MakeStore, make_run: MakeRun) -> None:
    store = make_store(name="again")
    run, original = Run.load(saved), make_run(store)
    assert run.path == saved
    assert (run.seed, run.train_config, run.task) == (7, {"lr": 1e-3}, "multilabel")
    assert run.label_set == store.label_set
    assert run.thresholds.values == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert run.features == original.features
    assert run.history[0] == {"epoch": 1, "loss": 0.25, "mAP": None}
    assert run.history[1]["mAP"] == 0.5
    for name, tensor in original.state.items():
        assert torch.equal(run.state[name], tensor)
    rows = store.rows(features=["clip/image"])
    assert torch.equal(logits(run, store, rows), logits(original, store, rows))


def test_only_plain_files(saved: Path) -> None:
    names = {p.name for p in saved.iterdir()}
    assert names == {"head.safetensors", "run.json", "history.csv", "README.md"}
    record = json.loads((saved / "run.json").read_text())
    assert record["format"] == 1
    assert record["features"]["image"]["feature"] == "clip/image"
    assert record["features"]["image"]["shape"] == [8]


def test_saving_again_replaces_and_keeps_checkpoints(saved: Path) -> None:
    (saved / "checkpoints").mkdir()
    (saved / "checkpoints" / "last").write_text("x")
    run = Run.load(saved)
    run.seed = 8
    run.save(saved)
    assert Run.load(saved).seed == 8
    assert (saved / "checkpoints" / "last").exists()


def test_the_head_is_in_evaluation_mode(saved: Path) -> None:
    head = Run.load(saved).build_head()
    assert not head.training
    out = head({"image": torch.zeros(3, 8)})
    assert out.shape == (3, 5)


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2 - 1], lambda raw: b"\xff,\n"])
def test_a_damaged_history_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "history.csv"
    path.write_bytes(damage(b"epoch,loss,lr\n1,0.5,0.1\n2,0.25,0.1\n"))
    with pytest.raises(InputError, match=r"history\.csv is damaged; delete it"):
        read_history(path)
    path.unlink()
    assert read_history(path) == []


def test_what_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        Run.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"is not a run: it has no run\.json"):
        Run.load(tmp_path)
    (tmp_path / "run.json").write_text("{not json")
    with pytest.raises(InputError, match="is not JSON"):
        Run.load(tmp_path)
    (tmp_path / "run.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="no format number"):
        Run.load(tmp_path)
    (tmp_path / "run.json").write_text('{"format": 1}')
    with pytest.raises(InputError, match="lacks"):
        Run.load(tmp_path)


def test_a_newer_format_is_refused(saved: Path) -> None:
    edit(saved, format=2)
    with pytest.raises(FormatVersionError, match="run format 2; this mmc reads up to 1"):
        Run.load(saved)


def test_weights_of_another_run_are_refused(saved: Path) -> None:
    weights = bytearray((saved / "head.safetensors").read_bytes())
    weights[-1] ^= 1
    (saved / "head.safetensors").write_bytes(weights)
    with pytest.raises(MmcError, match="is not the file"):
        Run.load(saved)
    (saved / "head.safetensors").unlink()
    with pytest.raises(MmcError, match=r"head\.safetensors: No such file"):
        Run.load(saved)


@pytest.mark.parametrize("values", [[0.5], [float("nan")] * 5, [2.0] * 5, ["a"] * 5])
def test_thresholds_that_do_not_fit_are_refused(saved: Path, values: list[Any]) -> None:
    record = json.loads((saved / "run.json").read_text())
    record["thresholds"]["values"] = values
    (saved / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="damaged"):
        Run.load(saved)


def test_an_edited_label_set_is_refused(saved: Path) -> None:
    edit(saved, label_set=["bus", "zug", "sea, sky", 'a "quoted" label', "never seen"])
    with pytest.raises(InputError, match="label set was edited"):
        Run.load(saved)


def test_names_resolve_only_in_the_table(saved: Path) -> None:
    edit(saved, head="os.system")
    with pytest.raises(InputError, match=r"unknown head 'os\.system'"):
        Run.load(saved).build_head()
    edit(saved, head="linear", head_config={"normalise": "l2"})
    with pytest.raises(InputError, match="did you mean normalize"):
        Run.load(saved).build_head()


def test_weights_that_do_not_fit(make_store: MakeStore, make_run: MakeRun) -> None:
    run = make_run(make_store())
    run.state["classifier.weight"] = torch.zeros(2, 3)
    with pytest.raises(MmcError, match="do not fit the head"):
        run.build_head()


def test_features_made_differently_are_refused_with_the_difference(
    make_store: MakeStore, make_run: MakeRun
) -> None:
    run = make_run(make_store())
    other = make_store(name="other", identity={"backbone": "tiny", "weights": "xyz", "size": 32})
    with pytest.raises(FingerprintMismatchError) as caught:
        run.resolve_features(other)
    message = str(caught.value)
    assert "clip/image" in message
    assert any(
        "weights" in line and "abc" in line and "xyz" in line for line in message.split("\n")
    )
    assert any("size" in line and "32" in line for line in message.split("\n"))
    assert "backbone:" not in message


def test_the_same_features_under_another_alias_are_found(
    make_store: MakeStore, make_run: MakeRun
) -> None:
    store = make_store()
    run = make_run(store)
    ref = run.features["image"]
    renamed = type(ref)(**{**vars(ref), "alias": "old", "feature": "old/image"})
    run.features = {"image": renamed}
    assert run.resolve_features(store) == {"image": "clip/image"}
    stranger = type(ref)(**{**vars(renamed), "fingerprint": "0" * 16})
    run.features = {"image": stranger}
    with pytest.raises(InputError, match=r"has no old/image.*--backbone open_clip:tiny --name old"):
        run.resolve_features(store)


def test_recipe_has_one_entry_per_alias(make_store: MakeStore, make_run: MakeRun) -> None:
    store = make_store()
    run = make_run(store)
    run.features["text"] = type(run.features["image"]).of(store, "clip/text")
    [entry] = run.recipe()
    assert (entry["alias"], entry["fields"]) == ("clip", ["image", "text"])
    assert entry["context"]["spec"] == "open_clip:tiny"
    assert entry["identity"]["weights"] == "abc"


def test_output_folders(tmp_path: Path, saved: Path) -> None:
    assert check_output(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    check_output(saved)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        check_output(tmp_path / "file")
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("# my project")
    with pytest.raises(InputError, match=r"holds other content \(README.md\)"):
        check_output(other)
    (saved / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"holds other content \(thesis.tex\)"):
        Run.load(saved).save(saved)


def test_a_failed_save_leaves_no_run(
    make_store: MakeStore, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(make_store(), train_config={"lr": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        run.save(tmp_path / "run")
    with pytest.raises(InputError):
        Run.load(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_model_card_says_how_good_on_what_and_how(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    run = Run.load(saved)
    assert f"| mAP | {run.metrics['val']['mAP']:.4f} | {run.metrics['test']['mAP']:.4f} |" in card
    assert "| sea, sky |" in card
    missing = run.metrics["test"]["per_label"]["positives"].count(0)
    assert f"Without any sample in `test`: {missing}." in card
    assert "1,060 samples (train 1,030, no split 30); 1,000 with an image" in card
    assert "mmc predict" in card
    assert "open_clip:tiny" in card
    assert run.features["image"].fingerprint in card
    assert "0.100 to 0.500" in card
    assert "one per label 0.6250" in card
    assert f"torch {torch.__version__.split('+')[0]}" in card


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_cards_of_the_other_tasks(
    task: str, make_store: MakeStore, make_run: MakeRun, tmp_path: Path
) -> None:
    store = make_store(task)
    run = make_run(store)
    run.metrics = {"val": evaluate(run, store, "val")}
    card = (run.save(tmp_path / "run").path or tmp_path).joinpath("README.md").read_text()
    assert "| accuracy |" in card
    assert ("| positive class | 1 |" in card) == (task == "binary")
    assert ("| its threshold | 0.5000 |" in card) == (task == "binary")
    assert np.isfinite(run.metrics["val"]["accuracy"])


def test_a_run_without_measurements_has_a_card(
    make_store: MakeStore, make_run: MakeRun, tmp_path: Path
) -> None:
    make_run(make_store()).save(tmp_path / "run")
    assert "Not measured" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"thresholds": None},
        {"thresholds": {"mode": "x"}},
        {"features": {}},
        {"features": {"image": {"alias": "clip"}}},
        {"label_set": None},
        {"task": "foo"},
    ],
)
def test_a_damaged_record_is_one_line(
    change: dict[str, Any], make_store: MakeStore, make_run: MakeRun, tmp_path: Path
) -> None:
    make_run(make_store()).save(tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(record | change), encoding="utf-8")
    with pytest.raises(InputError, match=r"run\.json"):
        Run.load(tmp_path / "run")


def test_keys_of_later_versions_are_passed_over(
    make_store: MakeStore, make_run: MakeRun, tmp_path: Path
) -> None:
    make_run(make_store()).save(tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    for feature in record["features"].values():
        feature["later"] = 1
    path.write_text(json.dumps(record | {"later": 1}), encoding="utf-8")
    assert Run.load(tmp_path / "run").features.keys() == record["features"].keys()


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_the_card_shows_what_is_taken_for_what(
    make_store: MakeStore, make_run: MakeRun, tmp_path: Path, task: str
) -> None:
    store = make_store(task, n=200, noise=2.0)
    run = make_run(store)
    run.metrics["test"] = evaluate(run, store, "test", device="cpu")
    run.save(tmp_path / "run")
    card = (tmp_path / "run" / "README.md").read_text()
    table = card.split("### What is taken for what on `test`")[1].split("\n## ")[0]
    confusion = run.metrics["test"]["confusion"]
    assert sum(map(sum, confusion)) == run.metrics["test"]["samples"]
    assert sum(map(sum, confusion)) > sum(row[i] for i, row in enumerate(confusion))
    for name, counts in zip(run.label_set, confusion, strict=True):
        assert f"| {name} | {' | '.join(map(str, counts))} |" in table


def test_of_many_classes_the_largest_confusions_are_shown(
    make_store: MakeStore, make_run: MakeRun
) -> None:
    run = make_run(make_store("multiclass"))
    run.label_set = tuple(f"c{i}" for i in range(21))
    table = np.diag(np.full(21, 8))
    table[4, 7], table[20, 0] = 2, 24
    positives = table.sum(1).tolist()
    per_label = {"label": list(run.label_set), "positives": positives, "f1": [0.5] * 21}
    largest = {"true": ["c20", "c4"], "predicted": ["c0", "c7"], "samples": [24, 2]}
    for given in ({"confusion": table.tolist()}, {"largest_confusions": largest}):
        run.metrics["val"] = {"samples": 194, **given, "per_label": per_label}
        card = render(run)
        part = card.split("### What is taken for what on `val`")[1].split("\n## ")[0]
        assert "| c20 | c0 | 24 | 75% |\n| c4 | c7 | 2 | 20% |" in part
        assert part.count("\n|") == 4
