"""Stores of which single labels are unknown: nothing takes them for yes or no."""

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from labels_case import quiet, store_of
from sklearn.metrics import average_precision_score, f1_score, log_loss

from mmc.heads.card import render
from mmc.heads.checks import _Chance
from mmc.heads.evaluate import evaluate as evaluate_run
from mmc.heads.evaluate import format_table
from mmc.heads.handover import export_samples
from mmc.heads.labels.around import around, shares
from mmc.heads.labels.duplicates import duplicate_rows, exact_groups
from mmc.heads.labels.material import Material
from mmc.heads.labels.posterior import label_probabilities
from mmc.heads.labels.suspects import judge, suspects
from mmc.heads.metrics import evaluate
from mmc.heads.models import graph
from mmc.heads.options import TrainConfig
from mmc.heads.predict import Predictor, predict
from mmc.heads.report import mixups
from mmc.heads.report.measured import counted, losses, measure
from mmc.heads.report.page import write_report
from mmc.heads.search.outoffold import _lists, _targets, _unknown
from mmc.heads.trainer import train


def hot_of(draw: np.random.Generator, shape: tuple[int, int], unknown: float = 0.4) -> np.ndarray:
    hot = (draw.random(shape) < 0.4).astype(np.int8)
    hot[draw.random(shape) < unknown] = -1
    return hot


@pytest.mark.parametrize(
    ("head", "settings"),
    [
        ("linear", ("loss.pos_weight=auto",)),
        ("linear", ("loss=zlpr",)),
        ("gat", ("head.nodes=learned",)),
        ("boost", ("head.rounds=1",)),
        ("ensemble", ()),
    ],
)
def test_what_a_training_reads_of_a_store_is_unknown_where_it_is(
    head: str, settings: tuple[str, ...], make_store, tmp_path: Path
) -> None:
    store = make_store(unknown=0.3, name="a")
    loss = None
    if settings[:1] == ("loss=zlpr",):
        loss, settings = "zlpr", ()
    config = TrainConfig(
        head=head, loss=loss, device="cpu", epochs=3, settings=settings, precision="float32"
    )
    report = train(store, tmp_path / "run", config)
    found = report.metrics["test"]
    assert found["unknown_entries"] > 0
    rows = store.rows(split="test", features=["clip/image", "clip/text"])
    rows = rows[store.labels.known[rows]]
    truth = store.labels.multi_hot(rows)
    logits = Predictor(report.run, store, device="cpu").logits(rows).numpy()
    ap = [
        average_precision_score(truth[known, label], logits[known, label])
        for label, known in enumerate((truth >= 0).T)
        if (truth[:, label] == 1).any()
    ]
    assert found["mAP"] == pytest.approx(np.mean(ap), abs=1e-6)


def test_priors_count_the_rows_that_know_a_label(make_store, tmp_path: Path) -> None:
    store = make_store(unknown=0.5)
    config = TrainConfig(head="linear", device="cpu", epochs=1, lr=1e-12, precision="float32")
    report = train(store, tmp_path / "run", config)
    rows = store.rows(split="train", features=["clip/image", "clip/text"], labelled=True)
    hot = store.labels.multi_hot(rows)
    share = ((hot == 1).sum(0) + 1) / ((hot >= 0).sum(0) + 2)
    bias = next(v for k, v in report.run.state.items() if k.endswith("bias"))
    np.testing.assert_allclose(bias.numpy(), np.log(share / (1 - share)), atol=1e-4)


def test_tables_say_of_how_many_rows_a_label_is_known(make_store, make_run, tmp_path) -> None:
    store = make_store(unknown=0.4, n=120)
    run = make_run(store)
    found = evaluate_run(run, store, "test", device="cpu")
    rows = store.rows(split="test", features=["clip/image"], labelled=True)
    hot = store.labels.multi_hot(rows)
    known = (hot[(hot >= 0).any(1)] >= 0).sum(0).tolist()
    assert found["per_label"]["known"] == known
    run.metrics = {"test": found}
    write_report(run, store, tmp_path / "r.html", split="test", device="cpu")
    page = (tmp_path / "r.html").read_text().split('id="labels"')[1].split("</table>")[0]
    for text in (format_table(found), render(run), page):
        assert re.search(r"(samples|positives)\W.*\bknown\b", text)
    row = next(line for line in format_table(found).splitlines() if line.startswith("bus"))
    assert row.split()[2] == str(known[store.label_set.index("bus")])
    whole = make_store(name="whole")
    assert "known" not in evaluate_run(make_run(whole), whole, "test", device="cpu")["per_label"]


def test_labels_known_of_no_row_are_left_out_of_averages() -> None:
    draw = np.random.default_rng(0)
    truth = hot_of(draw, (80, 3))
    truth[:, 2] = -1
    logits = torch.from_numpy(draw.normal(size=(80, 3)))
    found = evaluate(logits, torch.from_numpy(truth), "multilabel", label_set=["a", "b", "c"])
    f1 = [
        f1_score(truth[truth[:, i] >= 0, i], logits[truth[:, i] >= 0, i].numpy() >= 0)
        for i in (0, 1)
    ]
    assert found["macro_f1"] == pytest.approx(np.mean(f1))
    assert found["per_label"]["f1"][2] is None
    assert found["ece_per_label"] is not None
    assert found["weighted_f1"] is not None


def test_predictions_are_compared_with_the_known_labels_only() -> None:
    draw = np.random.default_rng(1)
    truth, chosen = hot_of(draw, (300, 3)), draw.random((300, 3)) < 0.5
    chance = _Chance()
    for part in (slice(0, 100), slice(100, 300)):
        chance.add(chosen[part], truth[part])
    expected, reached, best = chance.deviations()
    hits = mean = spread = most = 0.0
    for label in range(3):
        known = truth[:, label] >= 0
        yes, given = truth[known, label] == 1, chosen[known, label]
        n, a, b = known.sum(), yes.sum(), given.sum()
        hits, mean, most = hits + (yes & given).sum(), mean + a * b / n, most + min(a, b)
        spread += a * b * (n - a) * (n - b) / (n * n * (n - 1))
    assert expected == pytest.approx(mean)
    assert reached == pytest.approx((hits - mean) / np.sqrt(spread))
    assert best == pytest.approx((most - mean) / np.sqrt(spread))
    assert chance.rows == (truth >= 0).any(1).sum()


def test_out_of_fold_files_keep_what_is_unknown() -> None:
    truth = torch.from_numpy(hot_of(np.random.default_rng(2), (40, 4), 0.6))
    unknown = _unknown(truth)
    assert torch.equal(_targets(_lists(truth), unknown, 4, "multilabel"), truth)
    known = truth.clamp(min=0)
    assert _unknown(known) is None
    assert torch.equal(_targets(_lists(known), None, 4, "multilabel"), known)


def test_labels_occur_together_where_both_are_known() -> None:
    hot = hot_of(np.random.default_rng(3), (60, 5))
    cells = [[torch.tensor(np.flatnonzero(row == v)) for row in hot] for v in (1, -1)]
    rows = [
        (torch.tensor([0, *np.cumsum([len(c) for c in part])]), torch.cat(part)) for part in cells
    ]
    found = graph.conditional(*rows[0], 5, rows[1]).toarray()
    for i in range(5):
        for j in range(5):
            there = (hot[:, i] == 1) & (hot[:, j] >= 0)
            both = there & (hot[:, j] == 1)
            wanted = 0.0 if i == j else both.sum() / (there.sum() + 1)
            assert found[i, j] == pytest.approx(wanted)


def test_an_unknown_label_is_no_suspect_and_says_nothing(tmp_path: Path) -> None:
    """Two groups of samples; what is unknown is the very label that looks wrong."""
    draw = np.random.default_rng(4)
    group = np.arange(80) % 2
    vectors = draw.normal(0, 0.2, (80, 6)) + np.where(group[:, None], 1.0, -1.0)
    hot = np.stack([group, 1 - group, group], 1).astype(np.int8)
    lacking = np.zeros_like(hot, bool)
    lacking[draw.choice(80, 30, replace=False), 2] = True
    wrong = np.flatnonzero(~lacking[:, 2])[:3]
    hot[wrong, 2] = 1 - hot[wrong, 2]
    labels = [
        np.flatnonzero((row == 1) & ~off).tolist() for row, off in zip(hot, lacking, strict=True)
    ]
    unknown = [np.flatnonzero(off).tolist() for off in lacking]
    store = store_of(tmp_path / "s", vectors, labels, ("a", "b", "c"), unknown_labels=unknown)
    material = Material(store, device="cpu")
    judged = judge(material, quiet)
    assert judged is not None
    near = around(material, quiet, quiet)
    found = suspects(
        material, judged, 50, votes=lambda places: shares(material, [by.of(places) for by in near])
    )
    named = [(int(row["id"][1:]), row["label"]) for row in found]
    assert set(named) >= {(int(i), "c") for i in wrong}
    assert not any(lacking[i, "abc".index(label)] for i, label in named)

    told = shares(material, near)
    cosines, places = near[0].cosines, near[0].places
    for sample in (0, 17):
        weight = cosines[sample] * ~lacking[places[sample], 2]
        share = (weight * (hot[places[sample], 2] == 1)).sum() / weight.sum()
        assert told[sample, 2] == pytest.approx(share, abs=1e-5)


def test_probabilities_are_fitted_to_known_labels() -> None:
    """Entries that are unknown may say anything: nothing changes but they themselves."""
    draw = np.random.default_rng(5)
    scores = torch.from_numpy(draw.normal(size=(300, 1)).astype(np.float32))
    yes = torch.from_numpy(draw.random((300, 1))) < (3 * scores).sigmoid()
    truth = yes.to(torch.int8)
    truth[200:] = -1
    found = label_probabilities(scores.clone(), truth, "multilabel")
    alone = label_probabilities(scores[:200].clone(), truth[:200], "multilabel")
    torch.testing.assert_close(found[:200], alone)
    weights = np.abs(found[200:].numpy() - (3 * scores[200:]).sigmoid().numpy())
    assert weights.mean() < 0.1


def test_copies_differ_where_both_are_known(tmp_path: Path) -> None:
    labels = [[0], [0], [0], [0, 1], [], [1]]
    unknown = [[1], [], [1], [], [0, 1], [0]]
    keys = ["x", "x", "y", "y", "z", "z"]
    store = store_of(
        tmp_path / "s",
        np.eye(6),
        labels,
        ("a", "b", "c"),
        unknown_labels=unknown,
        image_key=keys,
        text_key=[None] * 6,
    )
    material = Material(store, device="cpu")
    rows = duplicate_rows(material, [exact_groups(material, "image")])
    assert {row["labels_differ"] for row in rows} == {0}
    other = store_of(tmp_path / "t", np.eye(2), [[0], [1]], "ab", image_key=["x", "x"])
    material = Material(other, device="cpu")
    assert {r["labels_differ"] for r in duplicate_rows(material, [exact_groups(material, "image")])}


def test_a_report_counts_known_labels(make_store, make_run) -> None:
    store = make_store(unknown=0.4)
    run = make_run(store)
    rows = store.rows(features=["clip/image", "clip/text"], labelled=True)
    found = measure(run, store, rows, "all", "cpu")
    truth, p = found.truth.numpy(), found.probabilities.double().numpy()
    assert (truth < 0).any()
    for row, loss in enumerate(losses(found, run).tolist()[:8]):
        known = truth[row] >= 0
        wanted = log_loss(truth[row][known], p[row][known], labels=[0, 1])
        assert loss == pytest.approx(wanted, rel=1e-4)
    once = counted(found, "multilabel", np.ones((1, len(found)), np.int32))
    for name in ("micro_f1", "macro_f1", "samples_f1", "subset_accuracy"):
        assert float(once[name][0]) == pytest.approx(found.metrics[name]), name
    shares_ = mixups.mix_ups(found, list(range(found.truth.shape[1])))
    chosen = found.decisions.numpy()
    for i, j in ((0, 1), (2, 0)):
        there = (truth[:, i] == 1) & (truth[:, j] == 0)
        assert float(shares_[i, j]) == pytest.approx(chosen[there, j].sum() / max(there.sum(), 1))


def test_an_exported_table_says_what_is_unknown(make_store, make_run, tmp_path: Path) -> None:
    store = make_store(unknown=0.3)
    run = make_run(store)
    export_samples(store, tmp_path / "t.parquet", "parquet", run=run, device="cpu")
    table = pq.read_table(tmp_path / "t.parquet")
    hot, names = store.labels.multi_hot(), np.array(store.label_set)
    decisions = predict(run, store).decisions.numpy()
    columns = ("labels", "unknown_labels", "predicted", "correct")
    for row, *cells in zip(hot, *(table[name].to_pylist() for name in columns), strict=True):
        labels, unknown, predicted, correct = cells
        if labels is None:
            assert unknown == []
            continue
        assert labels == names[row == 1].tolist()
        assert unknown == names[row < 0].tolist()
        if predicted is not None:
            assert correct == (set(predicted) - set(unknown) == set(labels))
    assert "user.unknown_labels" not in table.column_names
    assert len(decisions) == len(table)
