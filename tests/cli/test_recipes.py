"""mmc run: only what changed runs again, kills cost little, every mistake has its line."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import tiny_blip_captioner, tiny_open_clip

from mmc.store import EmbeddingStore

RECIPE = """\
# what was done, and why
source: set
extract:
  backbones:
    clip: {backbone}
heads:
  linear:
    features: clip/image
    epochs: 2
  second:
    head: mlp
    epochs: 2
    set:
      head.hidden: 8
compare:
predict:
  run: best
  out: predictions.csv
"""


def files(folder: Path) -> dict[Path, int]:
    """When each file was written; locks come and go."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path: path.stat().st_mtime_ns for path in found if not path.name.startswith(".lock")}


def states(result) -> dict[str, str]:
    return {step["step"]: step["state"] for step in result.json()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, dataset, backbone) -> Path:
    """A folder with a set, a recipe and what it made; read only."""
    from mmc.cli import app

    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(dataset, folder / "set")
    (folder / "r.yaml").write_text(RECIPE.format(backbone=backbone), encoding="utf-8")
    app(["run", str(folder / "r.yaml")], standalone_mode=False)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it: wherever a recipe's folder lies, what was made in it counts."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "r.yaml").read_text(encoding="utf-8")
    assert old in text
    (folder / "r.yaml").write_text(text.replace(old, new), encoding="utf-8")


def test_what_it_makes(finished):
    assert (finished / "predictions.csv").read_text(encoding="utf-8").count("\n") == 21
    text = (finished / "r.yaml").read_text(encoding="utf-8")
    for name in ("linear", "second"):
        run = finished / "r" / "runs" / name
        assert (run / "recipe.yaml").read_text(encoding="utf-8") == text
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        assert record["recipe_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert record["head_config"]["hidden"] == 8
    assert (finished / "r" / "compare.csv").is_file()


def test_the_second_time_nothing_is_done(mmc: Callable, folder):
    before = files(folder)
    result = mmc("run", folder / "r.yaml")
    assert result.code == 0, result.err
    assert result.out == ""
    steps = ("extract", "linear", "second", "compare", "predict")
    assert result.err.splitlines() == [f"{step}: unchanged" for step in steps]
    assert files(folder) == before


def test_comments_order_and_touched_files_change_nothing(mmc: Callable, folder):
    edit(folder, "# what was done, and why\n", "")
    edit(
        folder,
        "    features: clip/image\n    epochs: 2",
        "    epochs: 2\n    features: [clip/image]",
    )
    os.utime(folder / "set" / "train.csv")
    os.utime(folder / "set" / "images" / "3.jpg")
    steps = states(mmc("run", folder / "r.yaml", "--json"))
    ran = [step for step, state in steps.items() if state == "ran"]
    assert ran == ["extract"]  # a picture has another time, and turns out to be the same


def test_a_changed_head_is_trained_again_and_no_other(mmc: Callable, folder):
    before = files(folder)
    edit(folder, "head.hidden: 8", "head.hidden: 4")
    dry = mmc("run", folder / "r.yaml", "--dry-run", "--json")
    assert states(dry)["second"] == "would run"
    assert states(dry)["predict"] == "waits"
    assert files(folder) == {**before, folder / "r.yaml": files(folder)[folder / "r.yaml"]}
    result = mmc("run", folder / "r.yaml")
    assert "second: changed (set.head.hidden 8 -> 4)" in result.err
    assert "linear: unchanged" in result.err
    changed = {path for path, time in files(folder).items() if before.get(path) != time}
    assert folder / "r" / "runs" / "second" / "run.json" in changed
    assert not [path for path in changed if "store" in path.parts or "linear" in path.parts]
    assert set(states(mmc("run", folder / "r.yaml", "--json")).values()) == {"unchanged"}


def test_a_changed_sample_is_embedded_again_and_what_follows_is_made_anew(mmc: Callable, folder):
    table = folder / "set" / "train.csv"
    text = table.read_text(encoding="utf-8")
    table.write_text(text.replace("a bright day, outside", "a dull day", 1), encoding="utf-8")
    steps = {step["step"]: step for step in mmc("run", folder / "r.yaml", "--json").json()}
    assert steps["extract"]["reason"] == "changed (the source)"
    assert steps["extract"]["result"]["embedded"] == 1
    assert steps["linear"]["reason"] == "changed (the store)"
    assert steps["second"]["state"] == "ran"


def test_another_backbone_leaves_heads_that_do_not_read_it(mmc: Callable, folder, tmp_path):
    other = tiny_open_clip(tmp_path / "other", seed=1)
    result = mmc("run", folder / "r.yaml", "--set", f"extract.backbones.other={other}", "--json")
    assert result.code == 0, result.err
    steps = states(result)
    assert (steps["extract"], steps["linear"]) == ("ran", "unchanged")
    assert steps["second"] == "ran"  # reads all that there is


def test_a_backbone_that_changed_is_refused_until_it_is_forced(mmc: Callable, folder):
    edit(folder, "clip: open_clip", "clip: {fields: [image, text], batch_size: 4, spec: open_clip")
    text = (folder / "r.yaml").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if "batch_size" in line)
    edit(folder, line, f"{line}}}")
    result = mmc("run", folder / "r.yaml")
    assert result.code == 2
    assert "batch_size" in result.err
    assert "--force extract" in result.err
    result = mmc("run", folder / "r.yaml", "--force", "extract", "--json")
    assert result.code == 0, result.err
    identity = EmbeddingStore.open(folder / "r" / "store").provenance("clip").identity
    assert identity["batch_size"]["image"] == 4
    assert set(states(result).values()) == {"ran"}


@pytest.mark.parametrize(
    ("gone", "step"),
    [("r/runs/second/head.safetensors", "second"), ("predictions.csv", "predict")],
)
def test_what_is_gone_is_made_again(mmc: Callable, folder, gone, step):
    (folder / gone).unlink()
    result = mmc("run", folder / "r.yaml", "--json")
    assert result.code == 0, result.err
    assert f"{step}: what it made is gone" in result.err
    assert [name for name, state in states(result).items() if state == "ran"] == [step]
    assert (folder / gone).exists()


def test_a_forced_step_that_makes_the_same_changes_nothing_after_it(mmc: Callable, folder):
    result = mmc("run", folder / "r.yaml", "--force", "linear", "--json")
    assert [name for name, state in states(result).items() if state == "ran"] == ["linear"]
    result = mmc("run", folder / "r.yaml", "--force", "lineer")
    assert result.code == 2
    assert "did you mean linear" in result.error


def test_what_others_made_is_never_written_over(mmc: Callable, folder, trained):
    shutil.copytree(trained[1], folder / "r" / "runs" / "third")
    edit(folder, "compare:", "  third: {head: linear, epochs: 1}\ncompare:")
    before = files(folder)
    result = mmc("run", folder / "r.yaml")
    assert result.code == 2
    assert "runs/third is there, and this recipe has not made it" in result.error
    assert files(folder) == before
    shutil.rmtree(folder / "r" / "runs" / "third")
    (folder / "theirs.csv").write_text("precious", encoding="utf-8")
    assert mmc("run", folder / "r.yaml", "--set", "predict.out=theirs.csv").code == 2
    assert (folder / "theirs.csv").read_text(encoding="utf-8") == "precious"


def test_predictions_may_be_several_in_any_order(mmc: Callable, folder):
    several = (
        "predict:\n  - {out: predictions.csv}\n  - {out: scores.csv, scores: true, run: best}\n"
    )
    text = (folder / "r.yaml").read_text(encoding="utf-8")
    (folder / "r.yaml").write_text(text.split("predict:")[0] + several, encoding="utf-8")
    result = mmc("run", folder / "r.yaml", "--json")
    assert result.code == 0, result.err
    assert states(result)["predict scores.csv"] == "ran"
    assert "score:red" in (folder / "scores.csv").read_text(encoding="utf-8")
    first, second = several.splitlines()[1:]
    edit(folder, f"{first}\n{second}", f"{second}\n{first}")
    steps = states(mmc("run", folder / "r.yaml", "--json"))
    assert list(steps)[-2:] == ["predict scores.csv", "predict predictions.csv"]
    assert set(steps.values()) == {"unchanged"}


def test_two_recipes_do_not_share_a_folder(mmc: Callable, folder):
    shutil.copy(folder / "r.yaml", folder / "other.yaml")
    result = mmc("run", folder / "other.yaml", "--set", "out=r")
    assert result.code == 2
    assert "r holds what r.yaml made" in result.error


def test_killed_in_a_training_it_goes_on_there_and_no_second_one_starts_meanwhile(
    mmc: Callable, folder
):
    edit(folder, "compare:", LONG)
    command = [sys.executable, "-m", "mmc.cli", "run", str(folder / "r.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    checkpoint = folder / "r" / "runs" / "third" / "checkpoints" / "last.safetensors"
    try:
        give_up = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.02)
        assert checkpoint.exists(), process.communicate()
        second = mmc("run", folder / "r.yaml")
        assert second.code == 1
        assert f"is held by process {process.pid}" in second.error
        assert "another `mmc run` is at work on r.yaml" in second.error
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    result = mmc("run", folder / "r.yaml")
    assert result.code == 0, result.err
    assert "second: unchanged" in result.err
    assert "third: going on where it stopped" in result.err
    assert "continuing the unfinished training" in result.err
    # The best of three is another than the best of two, or is not; it was looked at.
    assert "compare: changed (runs" in result.err
    assert set(states(mmc("run", folder / "r.yaml", "--json")).values()) == {"unchanged"}


LONG = """\
  third:
    head: linear
    epochs: 600
    set: {optim.patience: 0, optim.checkpoint_seconds: 0}
compare:"""


def test_an_unfinished_training_with_other_settings_starts_again(mmc: Callable, folder):
    """Its checkpoint is of no use then, and must not be in the way."""
    checkpoints = folder / "r" / "runs" / "linear" / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "last.safetensors").write_bytes(b"of another training")
    (folder / "r" / "runs" / "linear" / "run.json").unlink()
    edit(folder, "    features: clip/image\n    epochs: 2", "    epochs: 1")
    result = mmc("run", folder / "r.yaml")
    assert result.code == 0, result.err
    assert "linear: changed (features clip/image -> default, epochs 2 -> 1)" in result.err


def test_prepared_and_captioned_on_the_way(mmc: Callable, dataset, backbone, tmp_path):
    captioner = tiny_blip_captioner(tmp_path / "captioner")
    recipe = tmp_path / "chain.yaml"
    recipe.write_text(
        f"""\
source: {{path: {{train: set/train.csv, test: set/test.csv}}}}
prepare: {{max_side: 32, to: csv}}
caption: {{backbone: {captioner}, beams: 1, max_tokens: 4}}
extract:
  source: {{text_template: "{{text}} and {{caption}}"}}
  backbones: {{clip: {backbone}}}
heads:
  first: {{head: linear, epochs: 1}}
  better: {{head: boost, epochs: 1, set: {{head.base: first, head.rounds: 1, head.hidden: 4}}}}
predict:
  run: better
  input: {{path: set/val.csv, text_template: "{{caption}} and {{comment}}"}}
  top_k: 1
  store: kept
  format: long
evaluate: {{runs: better}}
""",
        encoding="utf-8",
    )
    shutil.copytree(dataset, tmp_path / "set")
    dry = mmc("run", recipe, "--dry-run")
    assert dry.code == 0, dry.err
    assert not (tmp_path / "chain").exists()
    result = mmc("run", recipe, "--json")
    assert result.code == 0, result.err
    assert set(states(result).values()) == {"ran"}
    store = EmbeddingStore.open(tmp_path / "chain" / "store")
    assert len(store) == 80
    assert " and " in store.column("text")[0].as_py()
    assert (tmp_path / "chain" / "predictions.csv").read_text(encoding="utf-8").count("\n") == 21
    assert set(states(mmc("run", recipe, "--json")).values()) == {"unchanged"}
    first = ("--set", "heads.first.epochs=2")
    again = states(mmc("run", recipe, *first, "--json"))
    assert (again["extract"], again["first"], again["better"]) == ("unchanged", "ran", "ran")
    (tmp_path / "chain" / "prepared" / "train.csv").unlink()
    again = states(mmc("run", recipe, *first, "--json"))
    assert again == {
        "prepare": "ran",  # with it all pictures are written anew, so they are looked at
        "caption": "ran",
        "extract": "ran",
        "first": "unchanged",
        "better": "unchanged",
        "evaluate": "unchanged",
        "predict": "unchanged",
    }


def test_a_warning_of_the_store_is_given_once(mmc: Callable, trained, tmp_path):
    recipe = tmp_path / "heads.yaml"
    idle = "set: {optim.min_lr: 1e-5}"
    heads = f"  linear: {{epochs: 1, {idle}}}\n  mlp: {{epochs: 1, {idle}}}\n"
    recipe.write_text(f"store: {trained[0]}\nheads:\n{heads}", encoding="utf-8")
    result = mmc("run", recipe)
    assert result.code == 0, result.err
    assert result.err.count("optim.min_lr=1e-05 does nothing") == 1


def test_heads_alone_on_a_store_that_is_there(mmc: Callable, trained, tmp_path):
    recipe = tmp_path / "heads.yaml"
    heads = "  linear: {epochs: 1}\n  zero_shot: {features: clip/text}\n"
    text = f"store: {trained[0]}\nheads:\n{heads}"
    recipe.write_text(text, encoding="utf-8")
    assert mmc("run", recipe).code == 0
    recipe.write_text("store: nowhere\nheads: {linear: }\n", encoding="utf-8")
    result = mmc("run", recipe)
    assert result.code == 2
    assert "heads.yaml:2: heads without `extract` read a store" in result.error


BAD = [
    ("{backbone}\n", "{backbone}\n  epoch: 3\n", ":6: extract has no key 'epoch'; known: "),
    ("epochs: 2", "epoch: 2", ":9: heads.linear has no key 'epoch'; did you mean epochs?"),
    ("epochs: 2", "epochs: many", ":9: heads.linear setting epochs='many' is not a whole number"),
    ("epochs: 2", "sweep: [lr=1e-3|1e-2]", "heads.linear: --sweep setting lr='1e-3|1e-2' is not"),
    ("epochs: 2", "sweep: ['loss=bce,bcee']", "bcee"),
    ("epochs: 2", "epochs: yes", ":9: heads.linear setting epochs=True is not a whole number"),
    ("epochs: 2", "epochs: 0", ":9: heads.linear.epochs: --epochs must be 1 or more"),
    ("epochs: 2", "epochs: 2\n    epochs: 3", ":10: 'epochs' is given twice, first in line 9"),
    ("head: mlp", "head: mpl", ":10: heads.second: unknown head 'mpl'; did you mean mlp?"),
    ("    head: mlp\n", "", ":10: heads.second: unknown head 'second'"),
    (
        "head: mlp",
        "loss: bec\n    head: mlp",
        "heads.second: unknown loss 'bec'; did you mean bce?",
    ),
    ("head.hidden: 8", "head.hiden: 8", ":14: heads.second.set: head mlp has no setting 'hiden'"),
    ("head.hidden: 8", "head.hidden: -8", ":14: heads.second.set: head.hidden must be"),
    ("head.hidden: 8", "hidden: 8", ":14: heads.second.set: hidden: did you mean head.hidden?"),
    ("head.hidden: 8", "nope: 8", ":14: heads.second.set: nope: write head.KEY"),
    ("head.hidden: 8", "lr: 0.1", "set: lr: did you mean the key lr, beside `set`?"),
    ("head.hidden: 8", "optim.lr: 0.1", "'lr'; did you mean the key lr, beside `set`?"),
    (
        "epochs: 2",
        "weight_decay: 2",
        ":9: heads.linear has no key 'weight_decay'; did you mean optim.weight_decay under `set`?",
    ),
    ("  second:", "  Linear:", ":10: heads.Linear: 'Linear' and 'linear' are one folder"),
    ("  second:", "  nul.run:", ":10: heads.nul.run: 'nul.run' cannot name a folder on Windows"),
    ("  second:", "  ..:", ":10: heads...: run '..' cannot name a folder"),
    ("head.hidden: 8", "loss.gama: 8", ":14: heads.second.set: loss ce has no setting 'gama'"),
    ("head.hidden: 8", "head.hidden: {a: b}", ":14: heads.second.set.head.hidden holds keys"),
    ("    set:\n      head.hidden: 8", "    set: {head.base: third}", "'third' is no run of this"),
    ("clip/image", "clop/image", ":7: heads.linear: features: no backbone is called 'clop'"),
    ("{backbone}", "openclip:x", ":5: extract.backbones.clip: unknown backbone 'openclip'"),
    ("{backbone}", "[a, b]", ":5: extract.backbones.clip must be text, got ['a', 'b']"),
    (
        "source: set",
        "source: sett",
        ":2: source: there is no file or folder sett; did you mean set",
    ),
    ("source: set", "source: {path: set, task: many}", ":2: source setting task='many' is not"),
    ("source: set", "source: {task: binary}", ":2: source has no `path`"),
    ("source: set\n", "", ":2: extract needs a `source`"),
    ("run: best", "run: secnd", ":17: predict.run: there is no run 'secnd'; did you mean second?"),
    ("run: best", "format: kagle", ":17: predict setting format='kagle' is not"),
    ("out: predictions.csv", "labels: new.txt", "predict.labels: there is no file new.txt"),
    ("compare:", "compair:", ":15: r.yaml has no key 'compair'; did you mean compare?"),
    ("compare:", "compare: {runs: [linear, thrid]}", ":15: compare.runs: there is no run 'thrid'"),
    ("compare:", "compare: {out: predictions.csv}", "two steps write predictions.csv"),
    ("  second:", "  predict:", ":10: heads.predict: 'predict' is what a step is called"),
    ("heads:", "heads: [", ":8: not YAML: expected"),
    ("run: best", "run: 2024-01-01", ":17: 2024-01-01 is read as a date; put it in quotes"),
    ("  linear:", "  1:", ":7: the key 1 is no text; put it in quotes"),
    (
        "  linear:",
        "  !!python/name:os.system x:",
        ":7: not YAML: could not determine a constructor",
    ),
]


@pytest.mark.parametrize(("old", "new", "says"), BAD)
def test_what_is_wrong_is_said_with_its_line_before_any_work(
    mmc: Callable, dataset, backbone, tmp_path, old, new, says
):
    assert old in RECIPE
    text = RECIPE.replace(old, new, 1).replace("{backbone}", backbone)
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "set").symlink_to(dataset)
    result = mmc("run", tmp_path / "r.yaml")
    assert result.code == 2, result.err
    assert says in result.error
    assert result.error.startswith("error: r.yaml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.yaml", "set"]
