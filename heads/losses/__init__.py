"""The losses: one plain table. Adding one is its file here and its line below."""

from mmc.store.registry import Entry

GROUP = "mmc.losses"
"""Entry point group under which other packages register losses."""

LOSSES: tuple[Entry, ...] = (
    Entry(
        "bce",
        "mmc.heads.losses.bce:BCE",
        "binary cross-entropy per label",
        needs="multilabel",
    ),
    Entry(
        "ce",
        "mmc.heads.losses.ce:CE",
        "softmax cross-entropy over the classes",
        needs="one label per sample (binary, multiclass)",
    ),
)
