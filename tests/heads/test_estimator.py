"""HeadClassifier: what scikit-learn asks of a classifier, and the same weights as train-head's."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris, load_wine, make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    cross_val_predict,
    cross_val_score,
    train_test_split,
)
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from mmc.heads import Fields, HeadClassifier
from mmc.heads.artifact import Run
from mmc.heads.card import render
from mmc.heads.options import TrainConfig
from mmc.heads.predict import predict
from mmc.heads.trainer import train
from mmc.store import EmbeddingStore
from mmc.store.errors import InputError, MmcError, RowsNotDoneError

QUICK = {"epochs": 8, "batch_size": 64, "lr": 0.1}
FIELDS = ("clip/image", "clip/text")


@parametrize_with_checks([HeadClassifier(**QUICK)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_naming_heads_needs_no_torch():
    code = (
        "import sys, mmc.heads; from mmc.heads.models import HEADS; "
        "assert not hasattr(mmc.heads, 'nothing'); "
        "assert not {'torch', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def assert_same_state(first: Run, second: Run) -> None:
    assert first.state.keys() == second.state.keys()
    for name, value in first.state.items():
        assert torch.equal(value, second.state[name]), name


# -- the same as mmc train-head --------------------------------------------------------------------


def arrays_of(store: EmbeddingStore, split: str) -> tuple[dict, np.ndarray]:
    """Features by name, and y, of the usable rows of a split."""
    rows = store.rows(split=split, features=FIELDS, labelled=True)
    hot = store.labels.multi_hot(rows)
    y = hot if store.task == "multilabel" else np.array(store.label_set)[hot.argmax(1)]
    return {name: store[name].take(rows) for name in FIELDS}, y


@pytest.mark.parametrize("task", ["multilabel", "multiclass", "binary"])
def test_arrays_train_as_the_store_does(make_store: Callable, tmp_path: Path, task: str):
    store = make_store(task, n=200)
    settings = ("head.router_hidden=8",)
    config = TrainConfig(head="router", epochs=10, seed=3, device="cpu", settings=settings)
    report = train(store, tmp_path / "run", config)
    classifier = HeadClassifier(
        "router", epochs=10, random_state=3, device="cpu", settings={"head.router_hidden": 8}
    )
    (X, y), (X_val, y_val) = arrays_of(store, "train"), arrays_of(store, "val")
    classifier.fit(X, y, X_val=X_val, y_val=y_val)
    assert_same_state(classifier.run_, report.run)
    assert classifier.run_.thresholds == report.run.thresholds
    X_test, y_test = arrays_of(store, "test")
    rows = store.rows(split="test", features=FIELDS, labelled=True)
    told = predict(report.run, store, rows)
    assert np.array_equal(classifier.predict_proba(X_test), told.probabilities.numpy())
    metric = "subset_accuracy" if task == "multilabel" else "accuracy"
    assert classifier.score(X_test, y_test) == pytest.approx(report.metrics["test"][metric])


def test_a_store_has_labels_and_splits(make_store: Callable, tmp_path: Path):
    store = make_store("multiclass", n=200)
    report = train(store, tmp_path / "run", TrainConfig(epochs=10, lr=0.05, device="cpu"))
    classifier = HeadClassifier(epochs=10, lr=0.05, device="cpu").fit(store)
    assert_same_state(classifier.run_, report.run)
    assert classifier.classes_.tolist() == ["cat", "dog", "eel"]
    rows = store.rows(split="test", features=FIELDS, labelled=True)
    y = np.array(store.label_set)[store.labels.multi_hot(rows).argmax(1)]
    assert (classifier.predict(store, rows=rows) == y).mean() > 0.9
    accuracy = report.metrics["test"]["accuracy"]
    assert classifier.score(store, rows=rows) == pytest.approx(accuracy)
    with pytest.raises(RowsNotDoneError, match="2 of 200 samples have no features"):
        classifier.predict(store)
    with pytest.raises(ValueError, match="labels and splits come from the store"):
        classifier.fit(store, y)
    with pytest.raises(ValueError, match="fitted on a store"):
        classifier.predict({"image": store["clip/image"].take(rows)})
    classifier.save(tmp_path / "saved")
    assert_same_state(Run.load(tmp_path / "saved"), report.run)
    again = HeadClassifier.load(tmp_path / "run")
    assert np.array_equal(again.predict(store, rows=rows), classifier.predict(store, rows=rows))
    assert_same_state(again.fit(store).run_, report.run)


def test_some_rows_of_a_store(make_store: Callable):
    store = make_store("multilabel", n=200)
    whole = HeadClassifier(epochs=5).fit(store)
    part = HeadClassifier(epochs=5).fit(store, rows=np.arange(100))
    assert whole.run_.metrics["val"]["samples"] == 50
    assert part.run_.metrics["val"]["samples"] == 25
    mask = np.arange(200) < 100
    assert_same_state(HeadClassifier(epochs=5).fit(store, rows=mask).run_, part.run_)
    assert whole.score(store) == whole.run_.metrics["test"]["subset_accuracy"]
    for rows in ([200], [-1], [True], [[0]], [0.5]):
        with pytest.raises(ValueError, match="numbers below 200, or a mask"):
            HeadClassifier().fit(store, rows=rows)


def resplit(store: EmbeddingStore, moved: dict[str, str]) -> None:
    """Move the samples of splits into others."""
    split = [moved.get(name, name) for name in store.column("split").to_pylist()]
    table = store.samples.drop_columns(["_gone", "_source"])
    table = table.set_column(table.column_names.index("split"), "split", pa.array(split))
    store.sync(table, label_set=store.label_set, task=store.task, source=store.sources[0])


def test_a_store_is_never_scored_on_what_it_was_fitted_on(make_store: Callable):
    store = make_store("multilabel", n=200)
    classifier = HeadClassifier(epochs=5).fit(store)
    on_test = classifier.score(store)
    rows = store.rows(split="val", features=FIELDS, labelled=True)
    resplit(store, {"test": "train"})
    with pytest.warns(UserWarning, match=rf"no labelled test samples: .* its {len(rows)} val "):
        on_val = classifier.score(store)
    assert on_val == classifier.score(store, rows=rows) != on_test
    resplit(store, {"val": "train"})
    with pytest.raises(ValueError, match=r"no labelled test or val samples.*score\(store, rows="):
        classifier.score(store)
    assert classifier.score(store, rows=store.rows(features=FIELDS, labelled=True)) > 0


# -- how good --------------------------------------------------------------------------------------


def test_linear_is_as_good_as_logistic_regression():
    X, y = make_classification(
        1500, 40, n_informative=12, n_classes=4, n_clusters_per_class=1, random_state=0
    )
    X = StandardScaler().fit_transform(X)
    reference = LogisticRegression(max_iter=500).fit(X[:1000], y[:1000]).score(X[1000:], y[1000:])
    classifier = HeadClassifier(epochs=60, lr=0.01, settings={"head.normalize": "none"})
    ours = classifier.fit(X[:1000], y[:1000]).score(X[1000:], y[1000:])
    assert reference > 0.75
    assert ours > reference - 0.01


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("load", [load_iris, load_wine])
def test_small_tables_are_learned_as_they_are(load, head):
    """Columns of other scales than embeddings', and too few rows to hold some out."""
    X, X_test, y, y_test = train_test_split(
        *load(return_X_y=True), test_size=0.5, random_state=0, stratify=load(return_X_y=True)[1]
    )
    reference = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y)
    expected = reference.score(X_test, y_test)
    assert expected > 0.9
    assert HeadClassifier(head).fit(X, y).score(X_test, y_test) > expected - 0.05


def test_rows_are_held_out_where_they_are_many_or_needed():
    random = np.random.default_rng(0)
    X, y = random.normal(size=(60, 40)), np.arange(60) % 2
    whole = HeadClassifier(**QUICK).fit(X, y)
    assert whole.run_.metrics == {}
    assert [row["val_loss"] for row in whole.run_.history] == [None] * len(whole.run_.history)
    assert whole.run_.training["epochs"] == QUICK["epochs"]
    assert "Not measured" in render(whole.run_)
    part = HeadClassifier(validation_fraction=0.25, **QUICK).fit(X, y)
    assert part.run_.metrics["val"]["samples"] == 15
    several = HeadClassifier(**QUICK).fit(X, np.eye(3)[np.arange(60) % 3])
    assert several.run_.metrics["val"]["samples"] == 6
    staged = HeadClassifier("boost", **QUICK).fit({"image": X}, y)
    assert staged.run_.metrics["val"]["samples"] == 6
    many = HeadClassifier(epochs=1, batch_size=4096).fit(np.tile(X, (200, 1)), np.tile(y, 200))
    assert many.run_.metrics["val"]["samples"] == 1200


def test_what_is_a_table_and_what_an_embedding():
    random = np.random.default_rng(0)
    y = np.arange(60) % 2
    wide = random.normal(size=(60, 40))
    loud = wide * np.where(np.arange(40) == 7, 100, 1)

    def settings(X, **more):
        run = HeadClassifier("mlp", **QUICK, **more).fit(X, y).run_
        return [run.head_config[name] for name in ("normalize", "input_dropout")]

    assert settings(wide) == settings({"image": wide[:, :5]}) == ["center", 0.4]
    assert settings(wide[:, :5]) == settings(loud) == ["zscore", 0.0]
    chosen = {"head.normalize": "l2", "head.input_dropout": 0.2}
    assert settings(loud, settings=chosen) == ["l2", 0.2]


def two_modalities(n: int = 500, width: int = 6) -> tuple[Fields, np.ndarray]:
    """The answer is yes where exactly one of image and text says so."""
    random = np.random.default_rng(0)
    image, text = random.integers(0, 2, (2, n))
    direction = random.normal(size=width)
    X = Fields(
        {
            name: np.where(said, 1, -1)[:, None] * direction + random.normal(0, 0.4, (n, width))
            for name, said in (("image", image), ("text", text))
        }
    )
    return X, np.where(image ^ text, "yes", "no")


def test_mlp_learns_what_needs_both_modalities():
    X, y = two_modalities()
    joined = np.hstack([X["image"], X["text"]])
    linear = LogisticRegression().fit(joined[:350], y[:350])
    assert linear.score(joined[350:], y[350:]) < 0.65
    mlp = HeadClassifier("mlp", epochs=40, lr=0.01, settings={"head.hidden": 32})
    assert mlp.fit(X[:350], y[:350]).score(X[350:], y[350:]) > 0.95
    assert mlp.classes_.tolist() == ["no", "yes"]
    assert set(mlp.run_.features) == {"image", "text"}


# -- among scikit-learn's tools --------------------------------------------------------------------


def test_in_a_pipeline_and_cross_validated():
    X, y = make_classification(300, 10, n_informative=6, random_state=1)
    pipeline = make_pipeline(StandardScaler(), HeadClassifier(**QUICK))
    pipeline.set_params(headclassifier__head__normalize="none")
    scores = cross_val_score(pipeline, X * 100 + 7, y, cv=3, scoring="roc_auc")
    assert scores.min() > 0.8


def test_a_dictionary_is_cross_validated_as_fields():
    X, y = two_modalities()
    mlp = HeadClassifier("mlp", epochs=30, lr=0.01, settings={"head.hidden": 16})
    predicted = cross_val_predict(mlp, X, y, cv=2)
    assert (predicted == y).mean() > 0.95
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        cross_val_score(mlp, dict(X.items()), y)


def test_a_grid_over_settings():
    X, y = two_modalities()
    grid = {"head": ["linear", "mlp"], "head__normalize": ["none"], "lr": np.logspace(-2, -1, 2)}
    search = GridSearchCV(HeadClassifier(**QUICK), grid, cv=2, error_score="raise").fit(X, y)
    assert search.best_params_["head"] == "mlp"
    assert search.best_estimator_.run_.head_config["normalize"] == "none"
    assert search.predict_proba(X[:3]).shape == (3, 2)


def test_settings_are_parameters():
    classifier = HeadClassifier("mlp", settings={"head.hidden": 8, "optim.ema": 0.9})
    assert classifier.get_params()["head__hidden"] == 8
    copy = clone(classifier).set_params(head__hidden=16, loss__pos_weight="auto", lr=0.1)
    assert copy.settings == {"head.hidden": 16, "optim.ema": 0.9, "loss.pos_weight": "auto"}
    assert classifier.settings == {"head.hidden": 8, "optim.ema": 0.9}
    for wrong in ("nonsense", "body__hidden"):
        with pytest.raises(ValueError, match="Invalid parameter"):
            classifier.set_params(**{wrong: 1})
    X, y = two_modalities(60)
    fitted = copy.set_params(**QUICK).fit(X, y)
    assert fitted.run_.head_config["hidden"] == 16
    assert fitted.run_.loss_config["pos_weight"] == "auto"


def test_it_can_be_pickled_and_leaves_random_numbers_alone():
    X, y = make_classification(200, 10, random_state=0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fitted = HeadClassifier("mlp", **QUICK).fit(X, y)
    fitted.predict(X)
    assert torch.equal(torch.rand(3), expected)
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.predict_proba(X), fitted.predict_proba(X))
    assert_same_state(clone(again).fit(X, y).run_, fitted.run_)
    other = clone(again).set_params(random_state=np.random.RandomState(3)).fit(X, y)
    assert not np.array_equal(other.predict_proba(X), fitted.predict_proba(X))


# -- several labels per sample ---------------------------------------------------------------------


def several_labels(n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(2)
    y = (random.random((n, 3)) < (0.2, 0.4, 0.6)).astype(int)
    return (2 * y - 1) @ random.normal(size=(3, 12)) + random.normal(0, 0.5, (n, 12)), y


def test_multi_hot_rows():
    X, y = several_labels()
    names = ["bus", "sea", "zug"]
    classifier = HeadClassifier(**QUICK).fit(X[:300], pd.DataFrame(y[:300], columns=names))
    assert classifier.classes_.tolist() == names == list(classifier.run_.label_set)
    assert HeadClassifier(**QUICK).fit(X[:300], y[:300]).classes_.tolist() == [0, 1, 2]
    reference = MultiOutputClassifier(LogisticRegression()).fit(X[:300], y[:300])
    assert classifier.score(X[300:], y[300:]) >= reference.score(X[300:], y[300:]) - 0.05
    predicted = classifier.predict(X[300:])
    assert np.array_equal(predicted, classifier.decision_function(X[300:]) > 0)
    assert cross_val_score(classifier, X, y, cv=2, scoring="average_precision").min() > 0.9


def test_labels_that_are_not_known():
    X, y = several_labels()
    hidden = np.random.default_rng(0).random(y.shape) < 0.5
    partly = np.where(hidden, -1, y)
    classifier = HeadClassifier(**QUICK).fit(X, partly)
    assert classifier.score(X, y) > 0.8
    # Taking unknown for "no" would make the labels look half as frequent.
    assert np.allclose(classifier.predict_proba(X).mean(0), y.mean(0), atol=0.08)
    assert classifier.score(X, partly) >= classifier.score(X, y)
    known = np.flatnonzero((partly >= 0).any(1))[:200]
    rows = np.concatenate([known, np.flatnonzero((partly < 0).all(1))])
    val = {"X_val": X[known], "y_val": partly[known]}
    assert len(rows) > 200
    with_unknown = HeadClassifier(**QUICK).fit(X[rows], partly[rows], **val)
    without = HeadClassifier(**QUICK).fit(X[known], partly[known], **val)
    assert_same_state(with_unknown.run_, without.run_)
    with pytest.raises(ValueError, match="no sample has known labels"):
        classifier.score(X[:2], np.full((2, 3), -1))


def test_predictions_follow_the_tuned_threshold():
    random = np.random.default_rng(0)
    y = (random.random(3000) < 0.08).astype(int)
    X = y[:, None] * 1.2 + random.normal(size=(3000, 4))
    settings = {"head.normalize": "none", "optim.weight_decay": 1.0}
    classifier = HeadClassifier(settings=settings, validation_fraction=0.3, **QUICK).fit(X, y)
    [threshold] = classifier.run_.thresholds.values
    assert threshold < 0.45
    p = classifier.predict_proba(X)[:, 1]
    assert np.array_equal(classifier.predict(X), p >= threshold)
    assert np.array_equal(classifier.predict(X), classifier.decision_function(X) > 0)


# -- tokens, memory --------------------------------------------------------------------------------


def test_tokens_with_their_mask():
    random = np.random.default_rng(0)
    tokens = random.normal(size=(200, 5, 8)).astype(np.float16)
    mask = np.arange(5) < random.integers(1, 6, 200)[:, None]
    y = ((tokens[..., 0] > 1) & mask).any(1)
    X = {"text_tokens": tokens, "text_mask": mask.astype(int)}
    settings = {"head.width": 16, "head.feedforward": 16}
    classifier = HeadClassifier("ml_decoder", epochs=3, settings=settings).fit(X, y)
    assert set(classifier.run_.features) == {"text_tokens", "text_mask"}
    assert classifier.classes_.tolist() == [False, True]
    padded = {**X, "text_tokens": np.where(mask[..., None], tokens, 9).astype(np.float16)}
    assert np.allclose(classifier.predict_proba(X), classifier.predict_proba(padded), atol=1e-6)
    with pytest.raises(ValueError, match=r"text_tokens of X has shape \(4, 8\) per sample"):
        classifier.predict({"text_tokens": tokens[:, :4], "text_mask": mask[:, :4]})
    with pytest.raises(ValueError, match="no mask"):
        clone(classifier).fit({"text_tokens": tokens}, y)


def test_a_head_reads_the_features_that_are_named():
    X, y = two_modalities(100)
    both = {"a/image": X["image"], "b/image": X["text"], "flag": np.arange(100)}
    classifier = HeadClassifier(**QUICK).fit(both, y)
    assert set(classifier.run_.features) == {"a.image", "b.image"}
    assert "`a/image` (n, 6), `b/image` (n, 6)" in render(classifier.run_)
    del both["flag"]
    assert classifier.predict(both).shape == (100,)
    one = HeadClassifier(features=("own=text",), **QUICK).fit(X, y)
    assert set(one.run_.features) == {"own"}
    assert one.predict({"text": X["text"]}).shape == (100,)
    with pytest.raises(ValueError, match="--features sound: the store has no such alias"):
        HeadClassifier(features="sound").fit(X, y)


def test_what_does_not_fit_in_memory_is_streamed(capsys):
    X, y = make_classification(10_000, 200, n_informative=20, random_state=0)
    classifier = HeadClassifier(max_memory="5M", verbose=True, **QUICK).fit(X, y)
    assert "it is streamed" in capsys.readouterr().out
    assert classifier.score(X, y) > 0.8


# -- saved -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numbers", "words", "multi-hot"])
def test_saved_and_loaded(tmp_path: Path, kind: str):
    X, hot = several_labels(200)
    y = {"numbers": hot[:, 0] * 5 - 2, "words": np.array(["a", "b"], object)[hot[:, 0]]}.get(
        kind, hot
    )
    X = pd.DataFrame(X, columns=[f"c{i}" for i in range(12)])
    fitted = HeadClassifier("mlp", settings={"head.hidden": 8}, **QUICK).fit(X, y)
    assert fitted.save(tmp_path / "run") == tmp_path / "run"
    again = HeadClassifier.load(tmp_path / "run")
    assert np.array_equal(again.predict(X), fitted.predict(X))
    assert again.predict(X).dtype == fitted.predict(X).dtype
    assert again.classes_.tolist() == fitted.classes_.tolist()
    assert again.feature_names_in_.tolist() == list(X.columns)
    assert again.n_features_in_ == 12
    assert again.get_params()["head__hidden"] == 8
    assert_same_state(clone(again).fit(X, y).run_, fitted.run_)
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert 'HeadClassifier.load("run")' in card
    assert "mmc predict" not in card
    assert not list(tmp_path.rglob("*.pkl"))


def test_a_run_on_arrays_is_not_for_stores(make_store: Callable, tmp_path: Path):
    store = make_store("binary")
    X, y = arrays_of(store, "train")
    classifier = HeadClassifier(**QUICK).fit(X, y)
    run = Run.load(classifier.save(tmp_path / "run"))
    for ask in (lambda: predict(run, store), run.recipe, lambda: classifier.predict(store)):
        with pytest.raises(InputError, match="trained on arrays"):
            ask()


# -- what is refused -------------------------------------------------------------------------------

GOOD = np.random.default_rng(0).normal(size=(40, 4))
BINARY = np.arange(40) % 2
HOLE = np.where(np.arange(40) == 7, np.nan, GOOD.T).T


@pytest.mark.parametrize(
    ("parameters", "X", "y", "says"),
    [
        ({}, HOLE, BINARY, r"x has NaN or infinite values in 1 of 40 samples \(first: 7\)"),
        ({}, {"image": HOLE}, BINARY, "image has NaN"),
        ({}, {"image": GOOD * 1e300}, BINARY, "image has NaN or infinite values in 40 of 40"),
        ({}, {}, BINARY, "empty dictionary"),
        ({}, {"image": GOOD, "text": GOOD[1:]}, BINARY, "differ in their number of samples"),
        ({}, {"a/b/c": GOOD}, BINARY, "is no name of a field"),
        ({}, {"image": [["a"]] * 40}, BINARY, "must be an array of numbers"),
        ({}, {"image": GOOD[:0]}, BINARY[:0], "X has 0 samples"),
        ({}, GOOD, BINARY[1:], "inconsistent numbers of samples"),
        ({}, GOOD, np.zeros(40), "one class only"),
        ({}, GOOD, None, "requires y to be passed"),
        ({}, GOOD, [["a"], ["a", "b"]] * 20, "MultiLabelBinarizer"),
        ({}, GOOD, [["a"]] * 40, "MultiLabelBinarizer"),
        ({}, GOOD, np.full((40, 2), 3), "must hold 0 and 1"),
        ({"validation_fraction": 0.1}, GOOD[:2], BINARY[:2], "too few to hold some out"),
        ({"head": "routr"}, GOOD, BINARY, "unknown head 'routr'; did you mean router"),
        ({"head": "router"}, GOOD, BINARY, "give X as a dictionary of arrays"),
        ({"head": "router"}, {"image": GOOD}, BINARY, "router needs 2 or more fields"),
        ({"head": "ml_decoder"}, GOOD, BINARY, "give X as a dictionary of arrays"),
        ({"head": "zero_shot"}, {"image": GOOD}, BINARY, "needs label texts"),
        ({"loss": "bce"}, GOOD, BINARY, "loss bce is for multilabel"),
        ({"settings": {"head.nope": 1}}, GOOD, BINARY, "head linear has no setting 'nope'"),
        ({"settings": {"nope": 1}}, GOOD, BINARY, "group.key=value"),
        ({"settings": ["head.hidden=1"]}, GOOD, BINARY, "settings must be a dictionary"),
        ({"validation_fraction": 0}, GOOD, BINARY, "validation_fraction must be above 0"),
        ({"validation_fraction": "a lot"}, GOOD, BINARY, "validation_fraction must be above 0"),
        (
            {"head": "boost", "validation_fraction": None},
            {"image": GOOD},
            BINARY,
            "boost decides by held-out rows",
        ),
        ({"lr": "fast"}, GOOD, BINARY, "HeadClassifier setting lr='fast' is not a number"),
        ({"epochs": 2.5}, GOOD, BINARY, "epochs=2.5 is not a whole number"),
        ({"head": 3}, GOOD, BINARY, "head=3 is not a text"),
        ({"head": "mlp", "settings": {"head.hidden": 10**12}}, GOOD, BINARY, "are free; make it"),
        ({"head": "mlp", "settings": {"head.hidden": 10**18}}, GOOD, BINARY, "hidden=10+,"),
        ({"head": "mlp", "settings": {"head.hidden": 10**20}}, GOOD, BINARY, "fit into memory"),
        ({"lr": -1.0}, GOOD, BINARY, "lr must be above 0"),
    ],
)
def test_what_cannot_be_fitted_is_said_in_one_line(parameters, X, y, says):
    with pytest.raises(ValueError, match=says) as raised:
        HeadClassifier(**parameters).fit(X, y)
    assert "\n" not in str(raised.value)


def test_a_training_that_diverges_is_said_though_nothing_validates():
    with pytest.raises(MmcError, match="the training diverged: its loss is not finite"):
        HeadClassifier(lr=1e38, epochs=3).fit(GOOD, BINARY)


def test_what_does_not_go_with_what_was_fitted():
    fitted = HeadClassifier(**QUICK).fit(GOOD, BINARY)
    with pytest.raises(ValueError, match="X has 3 features, but HeadClassifier is expecting 4"):
        fitted.predict(GOOD[:, :3])
    with pytest.raises(ValueError, match="X has no 'x'; it has: image"):
        fitted.predict({"image": GOOD})
    with pytest.raises(ValueError, match="rows are those of a store"):
        fitted.predict(GOOD, rows=[0])
    both = HeadClassifier(**QUICK).fit({"image": GOOD, "text": GOOD}, BINARY)
    assert not hasattr(both, "n_features_in_")
    with pytest.raises(
        ValueError, match="a dictionary of arrays, as it was when fitted: image, text"
    ):
        both.predict(GOOD)
    with pytest.raises(ValueError, match="X has no 'text'"):
        both.predict({"image": GOOD})
    with pytest.raises(ValueError, match="X_val and y_val go together"):
        HeadClassifier().fit(GOOD, BINARY, X_val=GOOD)
    with pytest.raises(ValueError, match="y_val has classes that y has not: 2"):
        HeadClassifier().fit(GOOD, BINARY, X_val=GOOD[:3], y_val=[0, 1, 2])
    with pytest.raises(ValueError, match="X_val must have image"):
        HeadClassifier().fit({"image": GOOD}, BINARY, X_val={"text": GOOD}, y_val=BINARY)
