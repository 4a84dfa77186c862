"""Whether a source is as it was: a hash of its samples and of its pictures' sizes and times."""

import hashlib
import json
import os
from typing import Any

import pyarrow.compute as pc

from mmc.extract.sources.base import Samples, SourceOptions
from mmc.extract.sources.embedded import table_of
from mmc.extract.sources.paths import resolve_image
from mmc.extract.sources.read import read_source
from mmc.store.hashing import hash_table


def source_state(spec: str, options: SourceOptions) -> str:
    """sha256 (hex) of what a source holds now; pictures are looked at, not read.

    Raises:
        InputError: as `read_source`.
    """
    digest = hashlib.sha256()
    hash_samples(digest, read_source(spec, options))
    return digest.hexdigest()


def hash_samples(digest: Any, samples: Samples) -> None:
    """Feed samples, and size and modification time of their pictures, to a hash of `hashlib`."""
    hash_table(digest, samples.table)
    digest.update(json.dumps([samples.label_set, samples.task]).encode())
    for image in pc.unique(samples.table["image"]).drop_null().to_pylist():
        digest.update(json.dumps([image, _signature(samples.source, image)]).encode())


def _signature(source: dict[str, Any], image: str) -> tuple[int, int] | None:
    try:
        status = os.stat(resolve_image(source, table_of(image)[0]))
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
