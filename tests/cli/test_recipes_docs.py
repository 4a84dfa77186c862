"""The recipes of docs/recipes, each as it stands there, on tiny sets with tiny models."""

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_bert, tiny_blip, tiny_open_clip
from tiny_vision import tiny_fasterrcnn_vg

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
WORDS = ("red", "green", "blue", "dog", "cat", "horse", "car")
"""One colour of the pictures, and one class, for each."""


def picture(path: Path, at: int, random: np.random.Generator) -> None:
    """A noisy picture whose three channels say which word it is of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random.integers(0, 60, (36, 44, 3))
    pixels += 150 * np.array([(at + 1) >> bit & 1 for bit in range(3)])
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def table(path: Path, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def kaggle(folder: Path) -> None:
    random = np.random.default_rng(0)
    number = 0
    for split, count in (("train", 40), ("test", 8)):
        rows: list[list[object]] = [
            ["ImageID", "Labels", "Caption"][:: 1 if split == "train" else 2]
        ]
        for _ in range(count):
            shown, told = (int(at) for at in random.integers(0, 7, 2))
            picture(folder / "data" / f"{number}.jpg", shown, random)
            caption = f"a photo of the {WORDS[told]} and one picture"
            labels = " ".join(str(at) for at in {shown, told})
            rows.append([f"{number}.jpg", labels, caption][:: 1 if split == "train" else 2])
            number += 1
        table(folder / f"{split}.csv", rows)


def memes(folder: Path) -> None:
    random = np.random.default_rng(0)
    number = 10_000
    for split, count in (("train", 24), ("dev", 12), ("test", 8)):
        lines = []
        for _ in range(count):
            shown, told = (int(at) for at in random.integers(0, 2, 2))
            picture(folder / "img" / f"{number}.png", shown, random)
            one = {"id": number, "img": f"img/{number}.png", "text": f"the {WORDS[told]} runs"}
            lines.append(json.dumps(one | ({} if split == "test" else {"label": shown ^ told})))
            number += 1
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def tags(folder: Path) -> None:
    random = np.random.default_rng(0)
    tree = {"animal": ["cat", "dog", "horse"], "thing": ["car", "house", "tree"]}
    folder.mkdir(parents=True)
    (folder / "organized_Tags.json").write_text(json.dumps(tree), encoding="utf-8")
    names = sorted({*tree, *(name for below in tree.values() for name in below)})
    for number in range(60):
        at = int(random.integers(0, 6))
        parent = list(tree)[at // 3]
        picture(folder / "data" / f"{number}.jpg", at, random)
        encoded = [int(name in (parent, tree[parent][at % 3])) for name in names]
        sidecar = folder / "data" / f"{number}.json"
        sidecar.write_text(json.dumps({"encoded_labels": encoded}), encoding="utf-8")


def tweets(folder: Path) -> None:
    random = np.random.default_rng(0)
    rows: list[list[object]] = [["tweet_id", "tweet_text", "image", "label", "split"]]
    for number in range(84):
        split = ("train", "train", "train", "val", "test", "train")[number // 7 % 6]
        at = number % 7
        picture(folder / "images" / f"{number}.jpg", at, random)
        text = f"number {number}: a {WORDS[at]} sits on the house"
        rows.append([7 * 10**17 + number, text, f"{number}.jpg", f"class {WORDS[at]}", split])
    table(folder / "tweets.csv", rows)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "blip": tiny_blip(folder / "blip"),
        "bert": tiny_bert(folder / "bert"),
        "clip": tiny_open_clip(folder / "clip"),
        "detector": tiny_fasterrcnn_vg(folder / "detector"),
    }


CASES = {
    "kaggle-multilabel": (kaggle, "tiny_kaggle_csv", ("blip",), ("pooled", "decoder")),
    "hateful-memes": (
        memes,
        "tiny_hateful_memes_jsonl",
        ("detector", "bert"),
        ("words", "vilbert"),
    ),
    "open-vocabulary": (tags, "tiny_adds", ("clip",), ("zero_shot", "adds")),
    "tweets": (tweets, None, ("clip",), ("router", "fusion")),
}
SMALL = {
    "decoder": {"head.width": 16, "head.feedforward": 16},
    "fusion": {"head.width": 16, "head.feedforward": 16, "head.layers": 1},
    "adds": {"head.layers": 1},
    "vilbert": {"head.weights": ""},
}
"""What is set for speed; without official weights ViLBERT is a small one."""


def run_recipe(mmc: Callable, folder: Path, name: str, models: dict[str, str]):
    """Run a recipe beside its data, with other weights, fewer epochs and narrower heads."""
    shutil.copy(RECIPES / f"{name}.yaml", folder)
    _, _, aliases, heads = CASES[name]
    pairs = [f"extract.backbones.{alias}.spec={models[alias]}" for alias in aliases]
    if name == "tweets":
        tuned = f"{models['clip']}[lora=tweets/tuned]"
        pairs = [f"extract.backbones.clip.spec={tuned}", f"tune.backbone={models['clip']}"]
        pairs += ["tune.epochs=1"]
    pairs += [f"heads.{head}.epochs=2" for head in heads]
    for head in heads:
        pairs += [f"heads.{head}.set.{key}={value}" for key, value in SMALL.get(head, {}).items()]
    options = [part for pair in pairs for part in ("--set", pair)]
    result = mmc("run", folder / f"{name}.yaml", *options, "--json")
    assert result.code == 0, result.err
    return result.json()


def read(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_every_recipe_is_tested_and_told():
    told = (RECIPES / "README.md").read_text(encoding="utf-8")
    files = {path.stem for path in RECIPES.glob("*.yaml")}
    assert files == set(CASES)
    assert all(f"({name}.yaml)" in told for name in files)


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_runs_as_it_stands(mmc: Callable, tmp_path, models, name):
    make, _, _, heads = CASES[name]
    make(tmp_path / "data")
    (tmp_path / "new-tags.txt").write_text("zebra\nred car\ncat\n", encoding="utf-8")
    steps = run_recipe(mmc, tmp_path, name, models)
    assert {step["state"] for step in steps} == {"ran"}
    assert {step["step"] for step in steps} >= {"extract", *heads, "compare"}
    for head in heads:
        kept = (tmp_path / name / "runs" / head / "recipe.yaml").read_text(encoding="utf-8")
        assert kept.endswith((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    check = {
        "kaggle-multilabel": check_kaggle,
        "hateful-memes": check_memes,
        "open-vocabulary": check_tags,
        "tweets": check_tweets,
    }[name]
    check(tmp_path)


def check_kaggle(folder: Path) -> None:
    header, *rows = read(folder / "submission.csv")
    assert header == ["ImageID", "Labels"]
    assert [row[0] for row in rows] == [f"{number}.jpg" for number in range(40, 48)]


def check_memes(folder: Path) -> None:
    header, *rows = read(folder / "submission.csv")
    assert header == ["id", "proba", "label"]
    assert len(rows) == 8
    assert all(0 <= float(row[1]) <= 1 for row in rows)


def check_tags(folder: Path) -> None:
    old, new = read(folder / "tags.csv"), read(folder / "new-tags.csv")
    assert len(old) == len(new) > 1
    assert "score:cat" in old[0]
    assert {label for row in new[1:] for label in row[1].split("|")} == {"zebra", "red car", "cat"}


def check_tweets(folder: Path) -> None:
    header, *rows = read(folder / "predictions.csv")
    assert header[2:] == [f"score:class {word}" for word in sorted(WORDS)]
    assert len(rows) == 14
    found = json.loads((folder / "tweets" / "evaluation.json").read_text(encoding="utf-8"))
    assert set(found) == {"router", "fusion"}
    tuned = json.loads((folder / "tweets" / "tuned" / "tune.json").read_text(encoding="utf-8"))
    assert tuned["config"]["pairs"] == "exclude"
    run = json.loads((folder / "tweets" / "runs" / "router" / "run.json").read_text("utf-8"))
    assert "lora=" in json.dumps(run["features"])


@pytest.mark.shared_data
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[1]])
def test_a_recipe_runs_on_real_data(mmc: Callable, shared_data, tmp_path, models, name):
    (tmp_path / "data").symlink_to(shared_data / CASES[name][1])
    (tmp_path / "new-tags.txt").write_text("zebra\nred car\ncat\n", encoding="utf-8")
    steps = run_recipe(mmc, tmp_path, name, models)
    assert {step["state"] for step in steps} == {"ran"}
