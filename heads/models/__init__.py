"""The heads: one plain table. Adding one is its file here and its line below."""

from mmc.store.registry import Entry

GROUP = "mmc.heads"
"""Entry point group under which other packages register heads."""

HEADS: tuple[Entry, ...] = (
    Entry(
        "linear",
        "mmc.heads.models.linear:Linear",
        "one linear layer on the concatenated fields; fast, the one to try first",
        needs="any pooled fields",
    ),
    Entry(
        "mlp",
        "mmc.heads.models.mlp:MLP",
        "hidden layers on the concatenated fields; finds what depends on several fields at once",
        needs="any pooled fields",
    ),
    Entry(
        "router",
        "mmc.heads.models.router:Router",
        "one classifier per field, and a router that weights them anew for each sample",
        needs="two or more pooled fields",
    ),
    Entry(
        "zero_shot",
        "mmc.heads.models.zero_shot:ZeroShot",
        "cosine with the label texts; nothing is trained: the floor every head must beat",
        needs="one pooled field of a backbone with label texts",
    ),
)
