"""The graph of the labels as the `gat` head builds it, as files that other tools read."""

import io
import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np

from mmc.heads.labels.material import Material
from mmc.heads.labels.nearest import Views
from mmc.heads.models import graph
from mmc.heads.models.gat import GATConfig
from mmc.store.config import build

if TYPE_CHECKING:
    from mmc.heads.artifact import Run


def label_graph(material: Material, views: Views, run: "Run | None" = None) -> "nx.DiGraph[str]":
    """Nodes are labels, with their number of samples; an edge leads from the label that is heard
    to the one that hears it, with the weight it has there.

    Where the run's head is `gat` these are its own edges and labels, else those that the head would
    build from the samples by default. What is missing to 1 in the weights that lead to a label is
    the label's own.
    """
    config, names = GATConfig(), tuple(material.label_set)
    if run is not None and run.head == "gat":
        config, names = build(GATConfig, run.head_config, where="head gat"), run.label_set
        neighbors, weights = run.state["neighbors"], run.state["edge_weights"]
    else:
        texts = views.texts
        if texts is not None and bool(texts.isnan().any()):
            texts = None
        found = graph.build(
            views.together,
            None if texts is None else texts.numpy(),
            len(names),
            neighbors=config.neighbors,
            text_neighbors=config.text_neighbors,
            threshold=config.threshold,
            share=config.neighbor_share,
        )
        neighbors, weights = found.neighbors, found.weights
    place = {name: index for index, name in enumerate(material.label_set)}
    own = [place.get(name) for name in names]
    made: nx.DiGraph[str] = nx.DiGraph(
        **{key: value for key, value in asdict(config).items() if key in SETTINGS}
    )
    for index, name in zip(own, names, strict=True):
        made.add_node(name, samples=0 if index is None else int(views.counts[index]))
    to, column = (neighbors >= 0).nonzero(as_tuple=True)
    others = neighbors[to, column].tolist()
    together = _together(views, [own[i] for i in to.tolist()], [own[j] for j in others])
    for label, other, weight, samples in zip(
        to.tolist(), others, weights[to, column].tolist(), together, strict=True
    ):
        made.add_edge(names[other], names[label], weight=round(weight, 6), samples=samples)
    return made


def _together(views: Views, ours: list[int | None], theirs: list[int | None]) -> list[int]:
    """How many samples have both of each pair; 0 where the store lacks one."""
    known = [None not in pair for pair in zip(ours, theirs, strict=True)]
    some, other = (np.array([x or 0 for x in side], np.int64) for side in (ours, theirs))
    counts = np.asarray(views.pairs[some, other]).ravel() if len(some) else np.zeros(0)
    return np.where(known, counts, 0).astype(np.int64).tolist()


NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
SETTINGS = ("neighbors", "text_neighbors", "threshold", "neighbor_share")
"""Of the gat head, that decide the graph; they are the graph's attributes."""


def graphml(made: "nx.DiGraph[str]") -> bytes:
    """As GraphML: Gephi, yEd, Cytoscape, igraph and networkx read it.

    Characters of label names that XML cannot hold are written as ``\\x00``.
    """
    strange = {
        n: NOT_XML.sub(lambda c: f"\\x{ord(c[0]):02x}", n) for n in made if NOT_XML.search(n)
    }
    out = io.BytesIO()
    nx.write_graphml_xml(nx.relabel_nodes(made, strange) if strange else made, out)
    return out.getvalue()


def graph_json(made: "nx.DiGraph[str]") -> bytes:
    """As JSON: ``nodes`` (id, samples) and ``edges`` (source, target, weight, samples), which
    networkx and d3 read."""
    data: dict[str, Any] = nx.node_link_data(made, edges="edges")
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()
