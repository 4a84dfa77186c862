"""Graph attention: the label graph, the layer against a dense rewrite, and what it is for."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from mmc.heads import metrics
from mmc.heads.batches import ResidentData
from mmc.heads.engine import Engine
from mmc.heads.losses.bce import BCE
from mmc.heads.models import graph
from mmc.heads.models.gat import GAT, GATConfig
from mmc.heads.models.linear import Linear, LinearConfig
from mmc.heads.options import OptimConfig, TrainConfig
from mmc.heads.predict import logits
from mmc.heads.trainer import train
from mmc.store import EmbeddingStore, FieldSpec
from mmc.store.errors import InputError


def csr(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    indptr = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return indptr, torch.tensor([label for row in rows for label in row], dtype=torch.int64)


def build(rows: list[list[int]], labels: int, texts=None, **settings) -> graph.LabelGraph:
    given = {"neighbors": 3, "text_neighbors": 2, "threshold": 0.4, "share": 0.25, **settings}
    return graph.build(graph.conditional(*csr(rows), labels), texts, labels, **given)


# -- the graph -------------------------------------------------------------------------------------


def test_conditional_probabilities_by_hand():
    rows = [[0, 1], [0, 1], [0], [2], [1, 2]]
    found = graph.conditional(*csr(rows), 4).toarray()
    expected = np.array([[0, 2 / 4, 0, 0], [2 / 4, 0, 1 / 4, 0], [0, 1 / 3, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(found, expected)


def test_a_label_hears_from_those_that_it_makes_likely():
    rows = 8 * [[0, 1]] + 12 * [[1]] + 4 * [[2]]
    found = build(rows, 3)
    # 1 given 0 is 8/9; 0 given 1 is 8/21, below the threshold.
    assert found.neighbors.tolist() == [[1, -1, -1], [-1, -1, -1], [-1, -1, -1]]
    assert found.weights.tolist() == [[0.25, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_neighbours_share_their_part_in_proportion_and_the_strongest_stay():
    rows = 8 * [[0, 1, 2]] + 2 * [[0, 1, 3]] + 2 * [[0, 4]]
    found = build(rows, 5, neighbors=2, threshold=0.1)
    # Given 0 (12 rows): 1 is 10/13, 2 is 8/13, 3 and 4 are 2/13.
    assert found.neighbors[0].tolist() == [1, 2]
    assert found.weights[0].tolist() == pytest.approx([0.25 * 10 / 18, 0.25 * 8 / 18])


def test_near_texts_are_joined():
    g = np.random.default_rng(0)
    centers = np.repeat(np.eye(3, 8), 2, axis=0)
    texts = (5 + 3 * centers + 0.05 * g.normal(size=(6, 8))).astype(np.float32)
    found = build([], 6, texts, text_neighbors=1)
    assert found.neighbors[:, 0].tolist() == [1, 0, 3, 2, 5, 4]
    assert (found.neighbors[:, 1:] == -1).all()
    torch.testing.assert_close(found.weights[:, 0], torch.full((6,), 0.25))
    # The nearest of two opposed texts is no neighbour.
    assert (build([], 2, texts[:3:2]).neighbors == -1).all()


def test_edges_go_from_the_neighbour_to_the_label_and_weigh_one_together():
    found = build(8 * [[0, 1]] + 12 * [[1]], 3)
    pairs, weights = found.edges()
    assert pairs.tolist() == [[1, 0, 1, 2], [0, 0, 1, 2]]
    assert weights[:, 0].tolist() == [0.25, 0.75, 1, 1]
    sums = torch.zeros(3).index_add_(0, pairs[1], weights[:, 0])
    torch.testing.assert_close(sums, torch.ones(3))


@pytest.mark.parametrize("labels", [1, 4])
def test_a_graph_without_edges(labels):
    for texts in (None, np.ones((labels, 5), np.float32)):
        found = build([[0], [], [labels - 1]], labels, texts)
        assert (found.neighbors == -1).all()
        pairs, weights = found.edges()
        assert pairs.tolist() == [list(range(labels))] * 2
        assert (weights == 1).all()


def test_nodes_from_texts_keep_what_tells_them_apart():
    texts = 7 + torch.randn(10, 30)
    nodes = graph.text_nodes(texts, 16)
    assert nodes.shape == (10, 16)
    ratio = torch.cdist(nodes, nodes) / torch.cdist(texts, texts).clamp(min=1e-9)
    off = ratio[~torch.eye(10, dtype=torch.bool)]
    torch.testing.assert_close(off, off[0].expand_as(off), rtol=1e-3, atol=0)
    assert graph.text_nodes(torch.randn(1, 5), 4).tolist() == [[0, 0, 0, 0]]
    assert graph.text_nodes(torch.randn(3, 2), 4).isfinite().all()


# -- the head --------------------------------------------------------------------------------------


def random_head(labels: int = 5, **settings) -> GAT:
    torch.manual_seed(0)
    head = GAT({"image": (6,)}, labels, GATConfig(width=8, hidden=7, **settings)).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return head


@pytest.mark.parametrize("layers", [1, 2])
def test_the_classifiers_are_those_of_a_dense_rewrite(layers):
    """GATv2 label by label, in float64: attention over neighbours, edge weights as a feature."""
    head = random_head(layers=layers, attention_heads=2, threshold=0.1)
    head.fit_labels(*csr([[0, 1], [0, 1, 2], [1, 2], [3, 4], [2]]))
    assert (head.neighbors >= 0).sum() > 4
    p = {name: value.detach().double().numpy() for name, value in head.state_dict().items()}
    states = p["nodes"]
    for layer in range(layers):
        a = {k.split(".", 2)[2]: v for k, v in p.items() if k.startswith(f"attention.{layer}.")}
        source = states @ a["lin_l.weight"].T + a["lin_l.bias"]
        target = states @ a["lin_r.weight"].T + a["lin_r.bias"]
        out = np.zeros((5, 2, 4))
        for i in range(5):
            near = [(i, 1 - p["edge_weights"][i].sum())]
            near += [
                (int(j), w)
                for j, w in zip(p["neighbors"][i], p["edge_weights"][i], strict=True)
                if j >= 0
            ]
            for h in range(2):
                part = slice(4 * h, 4 * h + 4)
                scores, values = [], []
                for j, w in near:
                    z = source[j, part] + target[i, part] + w * a["lin_edge.weight"][part, 0]
                    scores.append(np.where(z > 0, z, 0.2 * z) @ a["att"][0, h])
                    values.append(source[j, part])
                share = np.exp(scores) / np.exp(scores).sum()
                out[i, h] = share @ np.array(values)
        attended = out.reshape(5, 8) + a["bias"]
        states = states + np.where(attended > 0, attended, np.expm1(attended))
    unit = states / np.linalg.norm(states, axis=1, keepdims=True)
    expected = p["own"] + unit @ p["classifiers.weight"].T
    found = head.label_states().detach().double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_label_depends_on_its_neighbours_and_on_no_others():
    head = random_head(threshold=0.1, neighbors=2)
    head.fit_labels(*csr(5 * [[0, 1]] + 3 * [[2, 3]] + [[4]]))
    before = head.label_states()
    with torch.no_grad():
        head.nodes[1] += 1
    changed = (head.label_states() - before).abs().amax(1) > 1e-6
    assert changed.tolist() == [True, True, False, False, False]


def test_the_gradient_reaches_every_parameter_and_every_node():
    head = random_head(threshold=0.1)
    head.fit_labels(*csr(5 * [[0, 1]] + 3 * [[1, 2, 3]] + [[4]]))
    head({"image": torch.randn(1, 6)}).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert (head.nodes.grad.abs().amax(1) > 0).all()


@pytest.mark.parametrize("labels", [1, 5])
def test_no_edges_and_one_sample(labels):
    head = random_head(labels)
    head.fit_labels(*csr([[0], []]))
    out = head({"image": torch.randn(1, 6)})
    assert out.shape == (1, labels)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_the_graph_is_saved_with_the_head():
    head = random_head(threshold=0.1)
    head.fit_labels(*csr(5 * [[0, 1]] + 3 * [[1, 2, 3]] + [[4]]))
    again = GAT(head.inputs, 5, head.config)
    again.load_state_dict(head.state_dict())
    batch = {"image": torch.randn(4, 6)}
    assert torch.equal(again.eval()(batch), head(batch))
    assert torch.equal(again.neighbors, head.neighbors)


def test_ten_thousand_labels():
    g = torch.Generator().manual_seed(0)
    labels = 10_000
    head = GAT(
        {"image": (8,)}, labels, GATConfig(), label_text=torch.randn(labels, 16, generator=g)
    )
    group = 20 * torch.randint(labels // 20, (2000, 1), generator=g)
    rows = (group + torch.arange(0, 20, 2)).flatten()
    head.fit_labels(torch.arange(0, len(rows) + 1, 10), rows)
    pairs, _ = graph.edges(head.neighbors, head.edge_weights)
    assert 2 * labels < pairs.shape[1] <= 9 * labels  # bounded whatever the data
    out = head({"image": torch.randn(16, 8, generator=g)})
    assert out.shape == (16, labels)
    out.square().mean().backward()
    assert head.classifiers.weight.grad.isfinite().all()


def test_nodes_from_texts_need_texts():
    head = GAT({"image": (6,)}, 3, GATConfig(nodes="text"))
    with pytest.raises(InputError, match="no alias that is read has label texts"):
        head.fit_labels(*csr([[0]]))
    texts = torch.randn(3, 9)
    assert torch.equal(
        GAT({"image": (6,)}, 3, GATConfig(), label_text=texts).nodes, graph.text_nodes(texts, 32)
    )
    learned = GAT({"image": (6,)}, 3, GATConfig(nodes="learned"), label_text=texts)
    learned.fit_labels(*csr([[0]]))
    assert (learned.neighbors == -1).all()  # nor are texts used for edges


@pytest.mark.parametrize(
    "settings",
    [
        {"width": 0},
        {"layers": 0},
        {"width": 30, "attention_heads": 4},
        {"text_neighbors": -1},
        {"input_dropout": 1.0},
        {"neighbor_share": 1.0},
        {"threshold": 0.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(InputError, match=f"head.{next(iter(settings))}"):
        GATConfig(**settings)


# -- what it is for --------------------------------------------------------------------------------


def families(seed: int = 0, groups: int = 6, each: int = 6, width: int = 64):
    """Labels of a family have nearly the same direction; 120 rows to learn 36 of them from."""
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(groups, width, generator=g).repeat_interleave(each, 0)
    labels = groups * each
    directions = centers + 0.3 * torch.randn(labels, width, generator=g)
    directions /= directions.norm(dim=1, keepdim=True)
    parts = []
    for rows in (120, 300, 1000):
        x = torch.randn(rows, width, generator=g)
        chance = (4 * x @ directions.T - 5).sigmoid()
        y = (torch.rand(rows, labels, generator=g) < chance).to(torch.int8)
        parts.append(({"image": x}, y))
    texts = centers @ torch.randn(width, 16, generator=g) / 8
    return parts, texts + 0.3 * torch.randn(labels, 16, generator=g)


def learned(head, parts) -> float:
    """Test mAP after training on the first part and choosing on the second."""
    (batch, y), (_, y_val), (_, y_test) = parts
    head.fit_inputs([batch])
    loss = BCE(BCE.Config(), y.sum(0).double(), torch.full((y.shape[1],), float(len(y))))
    head.set_prior(loss.prior())
    head.fit_labels(*csr([torch.nonzero(row).flatten().tolist() for row in y]))
    with torch.no_grad():
        inputs = [head.prepare(b) for b, _ in parts]
    Engine(
        head,
        loss,
        train=ResidentData(inputs=inputs[0], targets=y),
        val=ResidentData(inputs=inputs[1], targets=y_val),
        task="multilabel",
        batch_size=32,
        epochs=60,
        lr=0.002,
        optim=OptimConfig(),
        seed=0,
        dtype=torch.float32,
    ).run()
    with torch.no_grad():
        return metrics.score(head.score(inputs[2]), y_test, "multilabel")


def test_related_labels_learn_from_each_other_as_those_of_a_linear_head_cannot():
    parts, texts = families()
    torch.manual_seed(0)
    inputs, labels = {"image": (64,)}, len(texts)
    linear = learned(Linear(inputs, labels, LinearConfig()), parts)
    alone = learned(GAT(inputs, labels, GATConfig(nodes="learned", threshold=1.0)), parts)
    joined = learned(GAT(inputs, labels, GATConfig(), label_text=texts), parts)
    assert joined > linear + 0.04
    assert joined > alone + 0.01  # and it is the graph that does it, not the hidden layer


def test_a_store_with_label_texts(make_store, tmp_path):
    store = make_store(n=240)
    report = train(
        store, tmp_path / "plain", TrainConfig(head="gat", device="cpu", epochs=15, batch_size=16)
    )
    assert report.metrics["test"]["mAP"] > 0.9
    opened = EmbeddingStore.open(store.path)
    context = {"spec": "open_clip:tiny", "batch_size": 32}
    fields = [FieldSpec(name=t, shape=(8,), dtype="float16", tower=t) for t in ("image", "text")]
    identity = {"backbone": "tiny", "weights": "abc"}
    with opened.writer("clip", fields=fields, identity=identity, context=context) as writer:
        texts = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
        writer.write_label_text(store.label_set, texts, "a photo of a {label}")
    store = EmbeddingStore.open(store.path)
    report = train(
        store,
        tmp_path / "texts",
        TrainConfig(
            head="gat", device="cpu", epochs=15, batch_size=16, settings=("head.nodes=text",)
        ),
    )
    assert report.metrics["test"]["mAP"] > 0.9
    state = report.run.state
    assert (state["neighbors"][:, 0] >= 0).any()
    rows = store.rows(split="test", features=["clip/image", "clip/text"])
    assert logits(report.run, store, rows).isfinite().all()


def test_the_training_shows_the_labels_of_its_training_rows(make_store, tmp_path, monkeypatch):
    store = make_store(n=60)
    seen = []
    monkeypatch.setattr(GAT, "fit_labels", lambda self, *rows: seen.append(rows))
    train(store, tmp_path / "run", TrainConfig(head="gat", device="cpu", epochs=1))
    ((indptr, indices, unknown),) = seen
    assert unknown is None
    rows = store.rows(split="train", features=list(store.features))
    rows = rows[store.labels.known[rows]]
    expected = store.labels.multi_hot(rows)
    found = np.zeros_like(expected)
    for row in range(len(rows)):
        found[row, indices[indptr[row] : indptr[row + 1]].numpy()] = 1
    assert len(indptr) == len(rows) + 1
    np.testing.assert_array_equal(found, expected)


SCRIPT = """
import faiss
import torch
from mmc.heads.models import graph
indptr, indices = torch.tensor([0, 2, 4]), torch.tensor([0, 1, 0, 1])
x, w = torch.randn(512, 64), torch.randn(300, 64, requires_grad=True)
for _ in range(3):
    (x @ w.T).sum().backward()
    nodes = graph.text_nodes(w.detach(), 32)
    found = graph.build(
        graph.conditional(indptr, indices, 300),
        nodes.numpy(),
        300,
        neighbors=4,
        text_neighbors=3,
        threshold=0.4,
        share=0.25,
    )
print(int((found.neighbors >= 0).sum()) > 300)
"""


def test_faiss_may_be_imported_before_torch():
    """The other order is that of every other test here."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"
