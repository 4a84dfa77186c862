"""The graph of the labels as the `gat` head builds it, as files that other tools read."""

import io
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import networkx as nx

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

    Settings are those of the run where its head is `gat`, else the head's defaults. What is missing
    to 1 in the weights that lead to a label is the label's own.
    """
    config = GATConfig()
    if run is not None and run.head == "gat":
        config = build(GATConfig, run.head_config, where="head gat")
    texts = views.texts
    if texts is not None and (bool(texts.isnan().any()) or config.nodes == "learned"):
        texts = None
    found = graph.build(
        views.together,
        None if texts is None else texts.numpy(),
        len(material.label_set),
        neighbors=config.neighbors,
        text_neighbors=config.text_neighbors,
        threshold=config.threshold,
        share=config.neighbor_share,
    )
    names = material.label_set
    made: nx.DiGraph[str] = nx.DiGraph(
        **{key: value for key, value in asdict(config).items() if key in SETTINGS}
    )
    for index, name in enumerate(names):
        made.add_node(name, samples=int(views.counts[index]))
    for index, (others, weights) in enumerate(
        zip(found.neighbors.tolist(), found.weights.tolist(), strict=True)
    ):
        for other, weight in zip(others, weights, strict=True):
            if other >= 0:
                made.add_edge(
                    names[other],
                    names[index],
                    weight=round(weight, 6),
                    samples=int(views.pairs[index, other]),
                )
    return made


SETTINGS = ("neighbors", "text_neighbors", "threshold", "neighbor_share")
"""Of the gat head, that decide the graph; they are the graph's attributes."""


def graphml(made: "nx.DiGraph[str]") -> bytes:
    """As GraphML: Gephi, yEd, Cytoscape, igraph and networkx read it."""
    out = io.BytesIO()
    nx.write_graphml_xml(made, out)
    return out.getvalue()


def graph_json(made: "nx.DiGraph[str]") -> bytes:
    """As JSON: ``nodes`` (id, samples) and ``edges`` (source, target, weight, samples), which
    networkx and d3 read."""
    data: dict[str, Any] = nx.node_link_data(made, edges="edges")
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()
