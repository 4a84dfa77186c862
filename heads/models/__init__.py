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
        "ensemble",
        "mmc.heads.models.ensemble:Ensemble",
        "one classifier per field, and weights of the fields for every label",
        needs="two or more pooled fields",
    ),
    Entry(
        "boost",
        "mmc.heads.models.boost:Boost",
        "stages added to a finished run (--set head.base=RUN), each on what is still wrong",
        needs="any pooled fields, and what the base run reads",
    ),
    Entry(
        "gat",
        "mmc.heads.models.gat:GAT",
        "graph attention: labels that go together share what they learn; for many rare labels",
        needs="any pooled fields; label texts where there are any",
    ),
    Entry(
        "zero_shot",
        "mmc.heads.models.zero_shot:ZeroShot",
        "cosine with the label texts; nothing is trained: the floor every head must beat",
        needs="`image` or `text` of a backbone with label texts",
    ),
    Entry(
        "ml_decoder",
        "mmc.heads.models.ml_decoder:MLDecoder",
        "queries look at the tokens, one per group of labels; or one per label text",
        needs="tokens of images, texts or both",
    ),
    Entry(
        "fusion",
        "mmc.heads.models.fusion:Fusion",
        "a transformer encoder over the tokens of all fields, and a class token",
        needs="tokens or pooled fields",
    ),
    Entry(
        "dm_decoder",
        "mmc.heads.models.dm_decoder:DMDecoder",
        "label texts and image tokens read each other (ADDS); scores labels never seen in training",
        needs="image tokens of a backbone with label texts",
    ),
    Entry(
        "vilbert",
        "mmc.heads.models.vilbert:Vilbert",
        "two streams, regions and text, that read each other; loads the official ViLBERT weights",
        needs="regions, boxes and text tokens",
    ),
)
