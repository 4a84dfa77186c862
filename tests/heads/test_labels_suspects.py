"""Likely label errors: the fit that leaves one out, what the other labels explain, the ranking."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from labels_case import quiet, store_of
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge

from mmc.heads.labels import flips, posterior, suspects, unseen
from mmc.heads.labels.around import Around, around, around_some, shares
from mmc.heads.labels.material import Material
from mmc.heads.labels.ridge import Ridge as KernelRidge
from mmc.heads.search.outoffold import OutOfFold


def digit_pairs(n: int = 500, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors that are sums of two scans, and which digits they show: (n, 64), bool (n, 10)."""
    random = np.random.default_rng(seed)
    scans, digits = load_digits(return_X_y=True)
    pairs = random.integers(0, len(scans), (n, 2))
    truth = np.zeros((n, 10), bool)
    truth[np.arange(n)[:, None], digits[pairs]] = True
    return scans[pairs].sum(1), truth


def flipped(truth: np.ndarray, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which one entry of every twentieth sample is wrong, and which entries are."""
    random = np.random.default_rng(seed)
    wrong = np.zeros(truth.shape, bool)
    rows = random.choice(len(truth), len(truth) // 20, replace=False)
    wrong[rows, random.integers(0, truth.shape[1], len(rows))] = True
    return truth ^ wrong, wrong


def lists(given: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in given]


NAMES = [f"digit {i}" for i in range(10)]


def listed(material: Material, judged: suspects.Judged, limit: int, view=None) -> list[dict]:
    """Rows of suspects.csv."""

    def votes(places: np.ndarray) -> np.ndarray:
        return shares(material, around_some(material, places))

    return suspects.suspects(material, judged, limit, votes=votes, view=view)


def test_leaving_one_out_is_what_a_fit_without_it_says(tmp_path):
    vectors, truth = digit_pairs(60)
    material = Material(store_of(tmp_path / "store", vectors, lists(truth), NAMES))
    ridge = KernelRidge(material, material.labelled, truth.astype(np.int8), quiet)
    found = ridge.left_out().numpy()
    phi = ridge._map(material.gather(material.labelled)).double().numpy()
    for out in (0, 17, 59):
        rest = np.arange(60) != out
        fit = Ridge(alpha=ridge.penalty).fit(phi[rest], truth[rest].astype(float))
        np.testing.assert_allclose(found[out], fit.predict(phi[[out]])[0], atol=2e-4)


def test_other_labels_explain_what_a_label_looks_like():
    """Two labels that the scores cannot tell apart: exactly one of them is given, always."""
    random = np.random.default_rng(0)
    n = 2000
    first = random.random(n) < 0.5
    targets = torch.from_numpy(np.stack([first, ~first], 1).astype(np.int8))
    scores = torch.from_numpy(random.normal(0.5, 0.05, (n, 1)).repeat(2, 1)).float()
    scores += torch.from_numpy(random.normal(0, 0.01, (n, 2))).float()
    targets[0] = torch.tensor([1, 1], dtype=torch.int8)
    found = posterior.label_probabilities(scores, targets, "multilabel")
    right = torch.where(targets == 1, found, 1 - found)
    assert float(right[1:].min()) > 0.8
    assert float(right[0].max()) < 0.1


def test_probabilities_are_those_of_a_logistic_regression():
    random = np.random.default_rng(0)
    x = random.normal(0, 1, (4000, 1))
    y = random.random((4000, 1)) < 1 / (1 + np.exp(-(3 * x - 1)))
    found = posterior.label_probabilities(
        torch.from_numpy(x).float(), torch.from_numpy(y.astype(np.int8)), "multilabel"
    )
    fit = LogisticRegression(C=np.inf).fit(x, y[:, 0])
    np.testing.assert_allclose(found[:, 0], fit.predict_proba(x)[:, 1], atol=2e-3)


def test_flipped_labels_are_found(tmp_path):
    vectors, truth = digit_pairs()
    given, wrong = flipped(truth)
    material = Material(store_of(tmp_path / "store", vectors, lists(given), NAMES))
    judged = suspects.judge(material, quiet)
    rows = listed(material, judged, 1000)
    top = rows[: int(wrong.sum())]
    hits = [wrong[int(row["id"][1:]), NAMES.index(row["label"])] for row in top]
    assert np.mean(hits) >= 0.7
    # What is shown as a probability comes true.
    assert np.mean([row["score"] for row in top]) == pytest.approx(np.mean(hits), abs=0.25)
    assert {row["evidence"] for row in rows} == {"leave-one-out"}
    assert [row["score"] for row in rows] == sorted((r["score"] for r in rows), reverse=True)
    for kind in ("missing", "extra"):
        ranked = [row for row in rows if row["kind"] == kind]
        assert [row["rank"] for row in ranked] == list(range(1, len(ranked) + 1))
        for row in ranked:
            assert (row["label"] in row["labels"]) == (kind == "extra")


def test_one_label_per_sample_is_wrong_and_another_is_suggested(tmp_path):
    scans, digits = (part[:400] for part in load_digits(return_X_y=True))
    given = digits.copy()
    given[:20] = (given[:20] + 5) % 10
    store = store_of(tmp_path / "store", scans, [[int(d)] for d in given], NAMES, task="multiclass")
    material = Material(store)
    judged = suspects.judge(material, quiet)
    np.testing.assert_allclose(judged.probabilities.sum(1), 1, atol=0.01)
    rows = listed(material, judged, 20)
    assert {row["kind"] for row in rows} == {"wrong"}
    places = [int(row["id"][1:]) for row in rows]
    assert np.mean(np.array(places) < 20) >= 0.9
    good = [
        row["suggested"] == NAMES[digits[place]] for row, place in zip(rows, places, strict=True)
    ]
    assert np.mean(good) >= 0.9


def test_shares_are_of_labelled_neighbours(tmp_path):
    vectors = np.eye(4).repeat(3, 0) + 0.01 * np.random.default_rng(0).normal(size=(12, 4))
    labels = [[i // 3 % 2] for i in range(12)]
    labels[1] = None
    material = Material(store_of(tmp_path / "store", vectors, labels, ["even", "odd"]))
    near = around(material, quiet, quiet)
    found = shares(material, near)
    assert found.shape == (12, 2)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    assert (found.argmax(1) == [i // 3 % 2 for i in range(12)]).all()
    assert not (near[0].places == np.arange(12)[:, None]).any()


def test_a_run_counts_only_where_it_did_not_train(make_store, make_run):
    store = make_store(n=200, unlabelled=())
    run = make_run(store)
    material = Material(store, ["clip/text"])  # which tells nothing
    view = unseen.RunView(run, material, quiet)
    splits = np.array(material.split)
    assert (view.unseen == (splits != "train")).all()
    alone = suspects.judge(material, quiet)
    joined = suspects.judge(material, quiet, view)
    train = splits[material.labelled] == "train"
    torch.testing.assert_close(alone.probabilities[train], joined.probabilities[train])
    assert set(joined.evidence[train]) == {"leave-one-out"}
    assert set(joined.evidence[~train]) <= {"run", "leave-one-out + run"}
    for row in listed(material, joined, 99, view):
        assert (row["run"] is None) == (row["split"] == "train") == ("run" not in row["evidence"])
    said = view.probabilities[torch.from_numpy(material.labelled[~train])]
    mine = joined.probabilities[torch.from_numpy(~train)]
    # The run knows and our own view does not, so the joined order is the run's.
    used = [0, 1, 2, 3]
    assert np.corrcoef(said[:, used].ravel(), mine[:, used].ravel())[0, 1] > 0.9


def test_out_of_fold_predictions_count_for_training_samples(make_store, make_run, tmp_path):
    store = make_store(unlabelled=())
    run = make_run(store).save(tmp_path / "run")
    material = Material(store)
    plain = unseen.RunView(run, material, quiet)
    places = np.flatnonzero(np.array(material.split) == "train")[::2]
    logits = torch.arange(len(places) * 5).reshape(-1, 5) / 50 - 1
    OutOfFold(
        ids=pa.array([f"s{row}" for row in material.rows[places[::-1]]]),
        fold=torch.zeros(len(places), dtype=torch.int64),
        logits=logits.float().flip(0),
        targets=torch.zeros(len(places), 5, dtype=torch.int8),
        task="multilabel",
    ).save(tmp_path / "run")
    found = unseen.RunView(run, material, quiet)
    torch.testing.assert_close(found.probabilities[places], logits.sigmoid())
    assert (found.decisions[places] == (logits.sigmoid() >= 0.5).numpy()).all()
    assert found.unseen[places].all()
    assert found.out_of_fold.nonzero()[0].tolist() == places.tolist()
    judged = suspects.judge(material, quiet, found)
    known = np.searchsorted(material.labelled, places)
    assert all("out-of-fold" in kind or kind == "leave-one-out" for kind in judged.evidence[known])
    rest = np.setdiff1d(np.arange(len(material)), places)
    torch.testing.assert_close(found.probabilities[rest], plain.probabilities[rest])
    assert (found.unseen[rest] == plain.unseen[rest]).all()


def test_a_run_that_knows_nothing_changes_nothing():
    random = np.random.default_rng(0)
    y = random.random((500, 3)) < 0.4
    own = torch.from_numpy(np.where(y, 0.9, 0.1)).float()
    own[:50] = 1 - own[:50]
    noise = torch.from_numpy(random.random((500, 3))).float()
    found, _ = unseen.join(own, noise, torch.from_numpy(y.astype(np.int8)), "multilabel")
    assert np.corrcoef(found.ravel(), own.ravel())[0, 1] > 0.99


def test_a_run_with_the_labels_in_another_order(make_store, make_run):
    store = make_store()
    run = make_run(store)
    names = tuple(reversed(store.label_set))
    turned = make_run(store, label_set=names)
    straight = unseen.RunView(run, Material(store), quiet)
    found = unseen.RunView(turned, Material(store), quiet)
    torch.testing.assert_close(found.probabilities, straight.probabilities.flip(1), equal_nan=True)


@pytest.mark.parametrize("count", [3, 9])
def test_too_few_samples_say_nothing(tmp_path, count):
    store = store_of(tmp_path / "store", np.eye(12)[:count], [[0]] * count, ["only"])
    assert suspects.judge(Material(store), quiet) is None


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_flips_change_one_entry_of_a_share_of_the_samples(task):
    random = np.random.default_rng(0)
    truth = np.eye(5, dtype=np.int8)[random.integers(0, 5, 400)]
    if task == "multilabel":
        truth |= random.random(truth.shape) < 0.3
        truth[:50] = 1
        truth[50:100] = 0
    given, wrong = flips.flip(truth, task, random)
    np.testing.assert_array_equal(wrong, given != truth)
    each = wrong.sum(1)
    assert np.count_nonzero(each) == 20
    if task == "multiclass":
        assert (given.sum(1) == 1).all()
        assert set(each) == {0, 2}
        return
    assert set(each) == {0, 1}
    assert (given[:50].sum(1) >= 4).all()
    assert (given[50:100].sum(1) <= 1).all()


def test_a_score_is_the_share_that_is_wrong():
    """Where flipped labels are half as many as others that are doubted as much, half are wrong."""
    random = np.random.default_rng(0)
    doubts = random.uniform(0.2, 1, 30_000)
    wrong = np.arange(30_000) % 3 == 0
    scale = flips.fit_scale(doubts, wrong)
    np.testing.assert_allclose(scale([0.3, 0.6, 0.9]), 0.5, atol=0.05)
    assert scale.share == flips.SHARE
    # Nothing but flipped ones at the top: so many wrong labels there are not.
    doubts = np.concatenate([random.uniform(0.2, 0.6, 9000), random.uniform(0.8, 1, 1000)])
    wrong = np.concatenate([np.arange(9000) % 10 == 0, np.ones(1000, bool)])
    scale = flips.fit_scale(doubts, wrong)
    assert scale(0.95) == flips.MOST_CERTAIN
    assert scale(0.4) < 0.01
    assert scale.share < 0.01 * flips.SHARE
    rising = scale(np.linspace(0, 1, 50))
    assert (np.diff(rising) >= 0).all()


def test_labels_that_nothing_tells_get_low_scores(tmp_path):
    """The last label is drawn: it is doubted often, and hardly ever wrong."""
    vectors, truth = digit_pairs(400)
    truth[:, 9] = np.random.default_rng(3).random(400) < 0.3
    material = Material(store_of(tmp_path / "store", vectors, lists(truth), NAMES))
    rows = listed(material, suspects.judge(material, quiet), 1000)
    drawn = [row["score"] for row in rows if row["label"] == "digit 9" and row["kind"] == "extra"]
    assert len(drawn) > 50
    assert np.mean(drawn) < 0.3


def test_some_neighbours_are_those_of_all(make_store):
    material = Material(make_store())
    places = np.array([40, 3, 3, 17])
    for some, every in zip(
        around_some(material, places), around(material, quiet, quiet), strict=True
    ):
        assert isinstance(some, Around)
        np.testing.assert_allclose(some.cosines, every.of(places).cosines, atol=1e-6)
        assert (some.places == every.of(places).places).mean() > 0.98
