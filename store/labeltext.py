"""The embeddings of an alias's label prompts: one small plain array, ``<alias>/label_text``."""

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mmc.store.errors import DamagedStoreError, InputError
from mmc.store.files import Files
from mmc.store.layout import plain_json
from mmc.store.schema import dump
from mmc.store.shards import REMEDY, crc32c, with_crc, without_crc

LABEL_TEXT = "label_text"

LabelText = tuple[tuple[str, ...], npt.NDArray[np.float32], str]


def write_label_text(
    files: Files, prefix: str, labels: Sequence[str], array: npt.ArrayLike, prompt: str
) -> None:
    """Replace the label embeddings; a kill leaves the old ones, none, or the new ones.

    Raises:
        InputError: ``array`` is not (C, D) for C labels, C and D at least 1.
    """
    values = np.ascontiguousarray(array, "<f4")
    if values.ndim != 2 or values.shape[0] != len(labels) or 0 in values.shape:
        raise InputError(
            f"{len(labels)} labels need an array ({len(labels)}, D), got {values.shape}"
        )
    data = values.tobytes()
    # The checksum ties the names to the numbers: they are two files.
    attributes = {"labels": list(labels), "prompt": prompt, "crc32c": crc32c(data)}
    description = dump(plain_json(values.shape, {"mmc": attributes}))
    folder = f"{prefix}/{LABEL_TEXT}"
    if files.read(f"{folder}/zarr.json") == description:
        return
    files.remove(f"{folder}/zarr.json")
    files.write(f"{folder}/c.0.0", [with_crc(data)])
    files.write(f"{folder}/zarr.json", [description])


def read_label_text(files: Files, prefix: str) -> LabelText | None:
    """Label names, their embeddings (C, D) and the prompt; None when there are none.

    Raises:
        DamagedStoreError: the file is missing, damaged, or belongs to other names.
    """
    folder = f"{prefix}/{LABEL_TEXT}"
    raw = files.read(f"{folder}/zarr.json")
    if raw is None:
        return None
    where = files.where(f"{folder}/c.0.0")
    data = files.read(f"{folder}/c.0.0")
    if data is None:
        raise DamagedStoreError(f"{where} is missing; {REMEDY}")
    body = without_crc(data, where)
    try:
        description = json.loads(raw)
        attributes = description["attributes"]["mmc"]
        same = attributes["crc32c"] == crc32c(body)
        values = np.frombuffer(body, "<f4").reshape(description["shape"])
        labels, prompt = tuple(attributes["labels"]), attributes["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedStoreError(
            f"{files.where(folder)}/zarr.json is damaged: {type(error).__name__}: {error}; {REMEDY}"
        ) from None
    if not same:
        raise DamagedStoreError(f"{where} belongs to other label names; {REMEDY}")
    return labels, values, prompt
