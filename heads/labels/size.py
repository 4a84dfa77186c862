"""What the tables of samples and labels take of memory: said, or refused, before any work."""

from collections.abc import Callable

from mmc.heads.labels.material import Material
from mmc.heads.memory import free, shown
from mmc.store.errors import InputError

OWN_BYTES = 9
"""Of each label of each labelled sample: as given, its score, and its probability."""
RUN_BYTES, JOIN_BYTES = 5, 16
"""Of each label of each sample that a run answers, and of each labelled one that is joined."""
WORTH_SAYING = 1 << 30


def check_size(
    material: Material, *, with_run: bool, report: Callable[[str], None] = lambda line: None
) -> None:
    """Report what large tables take.

    Raises:
        InputError: more than is free.
    """
    labelled, labels = len(material.labelled), len(material.label_set)
    size = OWN_BYTES * labelled * labels
    if with_run:
        size += (RUN_BYTES * len(material) + JOIN_BYTES * labelled) * labels
    if size < WORTH_SAYING:
        return
    what = f"tables of {len(material):,} samples x {labels:,} labels take {shown(size)} of memory"
    left = free()
    if size > left:
        raise InputError(
            f"{what}, and {shown(left)} are free; look at a store of fewer samples, or of the "
            "labels that matter"
        )
    report(what)
