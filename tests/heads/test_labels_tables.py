"""The other tables: nearest labels, duplicates, outliers, what to label next, the graph."""

import json

import networkx as nx
import numpy as np
import pytest
import torch
from labels_case import quiet, store_of

from mmc.heads.artifact import Run
from mmc.heads.labels import duplicates, nearest, outliers, page, tolabel
from mmc.heads.labels.analysis import FILES, analyse_labels
from mmc.heads.labels.around import around
from mmc.heads.labels.graphfiles import graph_json, graphml, label_graph
from mmc.heads.labels.material import Material
from mmc.heads.options import TrainConfig
from mmc.heads.trainer import train
from mmc.heads.training import Setup
from mmc.store.errors import InputError

RANDOM = np.random.default_rng(0)


def clusters(count: int, each: int, width: int = 16, noise: float = 0.05) -> np.ndarray:
    centres = np.eye(width)[:count]
    return (centres.repeat(each, 0) + noise * RANDOM.normal(size=(count * each, width))).astype(
        "f4"
    )


def test_nearest_labels_by_each_view(tmp_path):
    """cat and kitten look alike, cat and dog are written alike, cat and owl occur together."""
    names = ["cat", "kitten", "dog", "owl", "sea"]
    base = np.eye(8)
    looks = {
        "cat": base[0],
        "kitten": base[0] + 0.3 * base[1],
        "dog": base[2],
        "owl": base[3],
        "sea": base[4],
    }
    vectors, labels = [], []
    for number, name in enumerate(names):
        for i in range(12):
            vectors.append(looks[name] + 0.02 * RANDOM.normal(size=8))
            labels.append([0, 3] if name == "cat" and i < 4 else [number])
    text = np.eye(5)
    text[2] = text[0] + 0.2 * text[2]
    text[4] += 0.2 * text[0]
    store = store_of(tmp_path / "store", vectors, labels, names, label_text=text)
    material = Material(store)
    views = nearest.label_views(material, quiet)
    rows = nearest.nearest_labels(material, views)
    first = {(r["label"], r["view"]): r for r in rows if r["rank"] == 1}
    assert first["cat", "text"]["nearest"] == "dog"
    assert first["cat", "centroid"]["nearest"] == "kitten"
    assert first["cat", "cooccurrence"]["nearest"] == "owl"
    assert first["cat", "cooccurrence"]["samples"] == 4
    assert first["cat", "cooccurrence"]["value"] == pytest.approx(4 / 13)
    assert first["cat", "cooccurrence"]["lift"] == pytest.approx((4 / 60) / (12 / 60 * 16 / 60))
    marked = {r["label"] for r in rows if r["disagree"]}
    assert "cat" in marked


def test_labels_without_samples_or_texts_are_left_out_of_the_view(tmp_path):
    store = store_of(tmp_path / "store", clusters(2, 6), [[i // 6] for i in range(12)], "abc")
    material = Material(store)
    rows = nearest.nearest_labels(material, nearest.label_views(material, quiet))
    assert {(r["label"], r["view"], r["nearest"]) for r in rows} == {
        ("a", "centroid", "b"),
        ("b", "centroid", "a"),
    }


def test_duplicates_are_grouped_and_leaks_told(tmp_path):
    vectors = RANDOM.normal(size=(30, 16))
    vectors[5] = vectors[4] = vectors[3]
    vectors[20] = vectors[10] * 2 + 0.01
    keys = [f"k{i}" for i in range(30)]
    keys[4] = keys[5] = "k3"
    split = ["train"] * 20 + ["test"] * 10
    labels = [[0]] * 30
    labels[20] = [1]
    store = store_of(tmp_path / "store", vectors, labels, ["a", "b"], image_key=keys, split=split)
    material = Material(store)
    near = around(material, quiet, quiet)
    groups = [duplicates.exact_groups(material, "image")]
    groups += [duplicates.near_groups(material, by) for by in near]
    rows = list(duplicates.duplicate_rows(material, groups))
    found = [(r["group"], r["kind"], r["id"], r["leak"], r["labels_differ"]) for r in rows]
    assert found == [
        (1, "near clip/image", "s10", 1, 1),
        (1, "near clip/image", "s20", 1, 1),
        (2, "image", "s3", 0, 0),
        (2, "image", "s4", 0, 0),
        (2, "image", "s5", 0, 0),
    ]
    assert duplicates.exact_groups(material, "text").members == []
    every = duplicates.near_groups(material, near[0], 0.01)
    assert max(map(len, every.members)) > 20


def test_the_samples_far_from_their_label_are_outliers(tmp_path):
    vectors = clusters(3, 40)
    vectors[7] = np.eye(16)[9]
    store = store_of(tmp_path / "store", vectors, [[i // 40] for i in range(120)], "abc")
    rows = outliers.outliers(Material(store), 5, quiet)
    assert (rows[0]["id"], rows[0]["label"], rows[0]["rank"]) == ("s7", "a", 1)
    assert rows[0]["cosine"] < rows[0]["usual"]
    unlabelled = store_of(tmp_path / "none", vectors, [None] * 120, [], task="unlabelled")
    first = outliers.outliers(Material(unlabelled), 5, quiet)[0]
    assert (first["id"], first["label"]) == ("s7", "")


def test_a_handful_of_outliers_that_are_alike_does_not_hide(tmp_path):
    """Four samples of another kind, near each other, with labels of ours; and a label too few."""
    vectors = clusters(2, 60)
    vectors[[3, 5, 70, 71]] = np.eye(16)[9] + 0.01 * RANDOM.normal(size=(4, 16))
    labels = [[i // 60] for i in range(120)]
    labels[10] = [0, 2]
    store = store_of(tmp_path / "store", vectors, labels, "abc")
    rows = outliers.outliers(Material(store), 1000, quiet)
    assert {row["id"] for row in rows[:4]} == {"s3", "s5", "s70", "s71"}
    assert all(row["score"] >= outliers.FLOOR for row in rows[:4])
    assert [row["score"] for row in rows] == sorted((r["score"] for r in rows), reverse=True)
    # A sample that is far from one of its labels and near another is no outlier.
    labels = [[0, 1] if i == 7 else [i // 60] for i in range(120)]
    store = store_of(tmp_path / "both", vectors, labels, "ab")
    assert "s7" not in {row["id"] for row in outliers.outliers(Material(store), 4, quiet)}
    # Many labels are looked at a few at a time.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outliers, "REFERENCE_VALUES", 1)
        again = outliers.outliers(Material(store), 4, quiet)
    assert [row["id"] for row in again] == [
        row["id"] for row in outliers.outliers(Material(store), 4, quiet)
    ]


def test_what_to_label_next_is_unsure_and_unlike(tmp_path):
    """Three unlabelled clusters lie where nothing is labelled; copies in one do not crowd it."""
    vectors = clusters(5, 20, noise=0.02)
    labels = [[i // 20] if i < 40 else None for i in range(100)]
    store = store_of(tmp_path / "store", vectors, labels, "ab")
    material = Material(store)
    rows = tolabel.to_label(material, None, None, 3, quiet)
    assert sorted(int(row["id"][1:]) // 20 for row in rows) == [2, 3, 4]
    assert [row["rank"] for row in rows] == [1, 2, 3]
    everything = tolabel.to_label(material, None, None, 1000, quiet)
    assert len({row["id"] for row in everything}) == 60


def test_uncertainty_is_entropy():
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]])
    assert tolabel.uncertainty(p, "multilabel").tolist() == pytest.approx([1, 0, 0.8113], abs=1e-4)
    assert tolabel.uncertainty(p, "binary").tolist() == pytest.approx([1, 0, 0.8113], abs=1e-4)


def test_the_graph_is_that_of_the_gat_head(tmp_path):
    names = ["cat", "dog", "owl", "sea", "sky"]
    labels = [[[0, 1], [0], [1, 2, 3], [3], [3, 4]][i % 5] for i in range(60)]
    split = [("train", "train", "val")[i % 3] for i in range(60)]
    store = store_of(
        tmp_path / "store",
        RANDOM.normal(size=(60, 8)),
        labels,
        names,
        split=split,
        label_text=RANDOM.normal(size=(5, 8)),
    )
    head, _ = Setup(store, TrainConfig(head="gat")).build()
    material = Material(store)
    made = label_graph(material, nearest.label_views(material, quiet))
    wanted = {
        (names[other], names[label]): pytest.approx(
            float(head.edge_weights[label, place]), abs=1e-5
        )
        for label, others in enumerate(head.neighbors.tolist())
        for place, other in enumerate(others)
        if other >= 0
    }
    assert wanted
    assert {(a, b): w for a, b, w in made.edges(data="weight")} == wanted
    read = nx.parse_graphml(graphml(made).decode())
    assert {(a, b): w for a, b, w in read.edges(data="weight")} == wanted
    assert set(read.nodes) == set(names)
    loaded = nx.node_link_graph(json.loads(graph_json(made)), edges="edges")
    assert nx.utils.graphs_equal(loaded, made)


def test_the_graph_of_a_trained_gat_is_its_own(tmp_path):
    """Trained on half of the labels' samples with other settings; the store has a label more."""
    names = ["cat", "dog", "owl", "sea", "sky"]
    labels = [[[0, 1], [0], [1, 2, 3], [3], [3, 4]][i % 5] for i in range(60)]
    split = [("train", "train", "val", "test")[i % 4] for i in range(60)]
    vectors, text = RANDOM.normal(size=(60, 8)), RANDOM.normal(size=(5, 8))
    store = store_of(tmp_path / "s", vectors, labels, names, split=split, label_text=text)
    settings = ("head.neighbors=2", "head.neighbor_share=0.5", "head.text_neighbors=1")
    config = TrainConfig(head="gat", epochs=1, settings=settings, device="cpu")
    train(store, tmp_path / "run", config)
    run = Run.load(tmp_path / "run")
    head = run.build_head()
    wanted = {
        (names[other], names[label]): pytest.approx(float(weight), abs=1e-5)
        for label in range(5)
        for other, weight in zip(head.neighbors[label], head.edge_weights[label], strict=True)
        if other >= 0
    }
    assert 0 < len(wanted) <= 10
    material = Material(store, run=run)
    made = label_graph(material, nearest.label_views(material, quiet), run)
    assert {(a, b): w for a, b, w in made.edges(data="weight")} == wanted
    assert made.graph["neighbor_share"] == 0.5
    one = made.edges["cat", "dog"] if made.has_edge("cat", "dog") else None
    assert one is None or one["samples"] == sum(
        split[i] == "train" and labels[i] == [0, 1] for i in range(60)
    )
    other = store_of(tmp_path / "o", vectors, [[i % 2] for i in range(60)], names[:2], split=split)
    smaller = Material(other)
    again = label_graph(smaller, nearest.label_views(smaller, quiet), run)
    assert {(a, b): w for a, b, w in again.edges(data="weight")} == wanted
    assert again.nodes["owl"]["samples"] == 0


def test_names_that_xml_cannot_hold(tmp_path):
    names = ["a\x00b", 'say "<&>"', "line\nbreak", "=cmd"]
    store = store_of(tmp_path / "s", RANDOM.normal(size=(12, 4)), [[0, 1, 2, 3]] * 12, names)
    material = Material(store)
    made = label_graph(material, nearest.label_views(material, quiet))
    read = nx.parse_graphml(graphml(made).decode())
    assert set(read.nodes) == {"a\\x00b", *names[1:]}
    assert json.loads(graph_json(made))["nodes"][0]["id"] == names[0]


def test_samples_whose_embeddings_are_not_finite_are_left_out_and_said(tmp_path):
    vectors = RANDOM.normal(size=(40, 4))
    labels = [[i % 2] for i in range(40)]
    bad = [3, 17, 18, 19, 20, 21, 22]
    others = [i for i in range(40) if i not in bad]
    damaged = vectors.copy()
    damaged[bad, 1] = np.nan
    damaged[17, 2] = np.inf
    said: list[str] = []
    store = store_of(tmp_path / "s", damaged, labels, "ab")
    found = analyse_labels(store, tmp_path / "out", report=said.append)
    told = "left out: 7 by clip/image (s3, s17, s18, s19, s20, ...)"
    assert [told in line for line in said] == [True]
    assert (found.samples, told in found.left_out) == (33, True)
    assert told in (tmp_path / "out" / "index.html").read_text()
    # The others are judged as in a store that never had them.
    whole = store_of(
        tmp_path / "w",
        vectors[others],
        [labels[i] for i in others],
        "ab",
        id=[f"s{i}" for i in others],
        image_key=[f"k{i}" for i in others],
    )
    assert analyse_labels(whole, tmp_path / "whole").left_out == ""
    for name in FILES:
        if name.endswith(".csv"):
            assert (tmp_path / "out" / name).read_bytes() == (
                tmp_path / "whole" / name
            ).read_bytes()


def test_the_page_shows_what_is_worth_a_look_and_says_what_it_leaves_out():
    row = {"kind": "extra", "id": "s1", "label": "a", "suggested": None, "evidence": "run"}
    row |= {"probability": 0.4, "neighbors": None, "run": None, "labels": ["a"], "text": ""}
    pictures = page._Pictures(None)
    some = page._suspects([{**row, "score": score} for score in (0.4, 0.1, 0.09)], pictures)
    assert some.count("remove <b>a</b>") == 2
    assert "All 3 are in suspects.csv" in some
    none = page._suspects([{**row, "score": 0.09}], pictures)
    assert "remove" not in none
    assert "None that is worth a look: of the 1 labels" in none
    near = {"view": "text", "nearest": "b", "value": 0.5, "disagree": 0}
    listed = page._nearest([{**near, "label": f"l{i}"} for i in range(201)])
    assert "The first 200 of 201 labels; all are in nearest_labels.csv." in listed
    assert listed.count('<th scope="row">') == 200
    assert "The first" not in page._nearest([{**near, "label": f"l{i}"} for i in range(200)])


def test_a_feature_without_any_finite_embedding_is_refused(tmp_path):
    store = store_of(tmp_path / "s", np.full((20, 4), np.nan), [[0]] * 20, ["a"])
    with pytest.raises(InputError, match=r"no embedding of clip/image in .* is finite"):
        Material(store)


def test_features_must_be_there(make_store):
    store = make_store()
    with pytest.raises(InputError, match="no feature 'clip/nothing'"):
        Material(store, ["clip/nothing"])
