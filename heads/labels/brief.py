"""What a report of a run shows of `mmc labels`: labels that may be wrong, and nearest labels."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmc.heads.labels import nearest, suspects
from mmc.heads.labels.around import around_some, shares
from mmc.heads.labels.material import Material, Progress
from mmc.heads.labels.size import check_size
from mmc.heads.labels.unseen import RunView
from mmc.store.errors import InputError

if TYPE_CHECKING:
    from mmc.heads.artifact import Run
    from mmc.store import EmbeddingStore


@dataclass(frozen=True, kw_only=True)
class Brief:
    """Rows as in the tables that `mmc labels` writes."""

    suspects: list[dict[str, Any]]
    nearest: list[dict[str, Any]]
    without: str = ""
    """Why there are none, where nothing can be compared."""
    left_out: str = ""
    """Which samples were not compared; empty: none were left out."""


def brief(
    store: "EmbeddingStore", run: "Run", limit: int, *, device: str, progress: Progress
) -> Brief:
    """``limit`` suspects of each kind, and the nearest labels, by all labelled samples.

    None where that would take more memory than there is: the rest of a report needs far less.
    """
    try:
        material = Material(store, run=run, device=device)
        check_size(material, with_run=True)
    except InputError as error:  # a run may read tokens alone, and a store hold nothing else
        return Brief(suspects=[], nearest=[], without=str(error))
    view = RunView(run, material, progress, trained=False)
    judged = suspects.judge(material, progress, view)
    found = []
    if judged is not None:
        found = suspects.suspects(
            material,
            judged,
            limit,
            votes=lambda places: shares(material, around_some(material, places)),
            view=view,
        )
    near = nearest.nearest_labels(material, nearest.label_views(material, progress))
    return Brief(suspects=found, nearest=near, left_out=material.left_out)
