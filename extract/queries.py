"""What to search a store for: a sample of it, a picture, or a text, as a vector of its features."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmc.extract.backbones.base import Backbone
from mmc.extract.images import ImageError, decode, read_image
from mmc.extract.label_text import embed_texts, load_like
from mmc.extract.settings import pick_device
from mmc.store import EmbeddingStore
from mmc.store.errors import InputError
from mmc.store.neighbors import vector_features

Kind = Literal["auto", "id", "image", "text"]

PICTURES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is searched for, and where."""

    kind: str
    """id, image or text."""
    feature: str
    """``alias/field`` that is searched."""
    vector: NDArray[np.float32]
    """(D,), in the space of that feature."""
    row: int | None = None
    """The sample of the store that it is, if it is one."""


def embed_query(
    store: EmbeddingStore,
    query: str,
    *,
    kind: Kind = "auto",
    feature: str | None = None,
    device: str = "auto",
) -> Query:
    """The vector of a sample's id, a picture file or a text.

    Args:
        query: an id of the store, else a file, else a text, unless ``kind`` says which.
        feature: what is searched; default: a picture and a sample are compared with pictures (a
            sample without one with what it has), a text with the pictures of a backbone that reads
            both, else with texts.
        device: where the backbone of a picture or a text runs, as ``--device`` takes it.

    Raises:
        InputError: no such sample or file, not a picture, or a backbone that cannot read it.
    """
    if feature is not None:
        store[feature]  # says what there is if this is not
    if kind in ("auto", "id"):
        row = pc.index(store.column("id"), query).as_py()
        if row >= 0 and store.live[row]:
            return _of_row(store, row, query, feature)
        if kind == "id":
            raise InputError(f"{store.path} has no sample {query!r}")
    path = Path(query)
    if kind == "image" or (kind == "auto" and _is_picture(path)):
        return _of_image(store, path, feature or _default(store, "image")[0], device)
    return _of_text(store, query, feature or _default_for_text(store), device)


def _is_picture(path: Path) -> bool:
    """Whether a query is a file, or is called like one: nobody searches for the text "cat.jpg"."""
    if path.suffix.lower() in PICTURES:
        return True
    try:
        return path.is_file()
    except (OSError, ValueError):  # a text that is too long for a name, or holds a NUL
        return False


def _default(store: EmbeddingStore, *fields: str) -> list[str]:
    """The vectors of these fields ("": any), the earlier fields first.

    Raises:
        InputError: there are none.
    """
    found = vector_features(store)
    named = [name for field in fields for name in found if not field or name.endswith(f"/{field}")]
    if not named:
        raise InputError(
            f"{store.path} has no {fields[0] or 'pooled'} vectors to search"
            + (f"; it has {', '.join(found)}: choose with --features" if found else "")
        )
    return list(dict.fromkeys(named))


def _default_for_text(store: EmbeddingStore) -> str:
    """Pictures of a backbone that has both towers, else texts."""
    found = vector_features(store)
    both = [f for f in found if f.endswith("/image") and f"{f.split('/')[0]}/text" in found]
    return both[0] if both else _default(store, "text")[0]


def _of_row(store: EmbeddingStore, row: int, query: str, feature: str | None) -> Query:
    candidates = [feature] if feature is not None else _default(store, "image", "text", "")
    for name in candidates:
        if store[name].done[row]:
            vector = store[name].take([row])[0].astype(np.float32)
            return Query(kind="id", feature=name, vector=vector, row=row)
    raise InputError(f"sample {query!r} has no {' nor '.join(candidates)}; run `mmc extract`")


def _of_image(store: EmbeddingStore, path: Path, feature: str, device: str) -> Query:
    try:
        data = read_image(path)
    except ImageError as error:
        raise InputError(f"{path}: {error}") from None
    backbone, name = _backbone(store, feature, "image", device)
    transform = backbone.image_transform
    if transform is None:
        raise InputError(f"the backbone of {feature} reads no pictures")
    try:
        pixels = decode(data, transform).to(pick_device(device))
    except ImageError as error:
        raise InputError(f"{path}: {error}") from None
    # A backbone that takes pictures in their own size takes them as a list.
    batch: Any = pixels[None] if transform.shape else [pixels]
    values = backbone.encode_image(batch, [name])[name]
    return Query(kind="image", feature=feature, vector=values[0].float().cpu().numpy())


def _of_text(store: EmbeddingStore, text: str, feature: str, device: str) -> Query:
    if not text.strip():
        raise InputError("--query is empty; give an id, a picture or a text")
    backbone, _ = _backbone(store, feature, "text", device)
    return Query(kind="text", feature=feature, vector=embed_texts(backbone, [text])[0])


def _backbone(store: EmbeddingStore, feature: str, tower: str, device: str) -> tuple[Backbone, str]:
    """The backbone of ``feature``, and its field of ``tower`` that lies in the feature's space.

    Raises:
        InputError: it has none.
    """
    alias, _, field = feature.partition("/")
    provenance = store.provenance(alias)
    backbone = load_like(
        {"alias": alias, "identity": provenance.identity, "context": provenance.context},
        device=device,
    )
    own = backbone.fields.get(field)
    if own is not None and own.tower == tower and len(own.shape) == 1 and tower == "image":
        return backbone, field
    # `image` and `text` of one backbone lie in one space where it has both, and only they do.
    other = backbone.fields.get(tower)
    if field in ("image", "text") and other is not None and other.shape == store[feature].shape[1:]:
        return backbone, tower
    raise InputError(
        f"{feature} cannot be searched by {'a picture' if tower == 'image' else 'a text'}: its "
        f"backbone puts no {tower} into that space; choose another with --features"
    )
