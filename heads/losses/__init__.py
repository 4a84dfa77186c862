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
        "smooth_bce",
        "mmc.heads.losses.smooth_bce:SmoothBCE",
        "bce with targets drawn towards one half, or the label's prior; for doubtful labels",
        needs="multilabel",
    ),
    Entry(
        "focal",
        "mmc.heads.losses.focal:Focal",
        "bce that counts what is already right little",
        needs="multilabel",
    ),
    Entry(
        "asl",
        "mmc.heads.losses.asl:ASL",
        "asymmetric loss: easy negatives count little or nothing; for many rare labels",
        needs="multilabel",
    ),
    Entry(
        "zlpr",
        "mmc.heads.losses.zlpr:ZLPR",
        "ranks each sample's positives above zero and its negatives below",
        needs="multilabel",
    ),
    Entry(
        "aam",
        "mmc.heads.losses.aam:AAM",
        "bce on cosines, positives right by an angular margin",
        needs="multilabel; a head with cosine outputs (linear, mlp)",
    ),
    Entry(
        "ce",
        "mmc.heads.losses.ce:CE",
        "softmax cross-entropy over the classes",
        needs="one label per sample (binary, multiclass)",
    ),
    Entry(
        "smooth_ce",
        "mmc.heads.losses.ce:SmoothCE",
        "ce with targets drawn towards all classes; for doubtful labels",
        needs="one label per sample (binary, multiclass)",
    ),
    Entry(
        "focal_ce",
        "mmc.heads.losses.focal_ce:FocalCE",
        "ce that counts what is already right little",
        needs="one label per sample (binary, multiclass)",
    ),
)
