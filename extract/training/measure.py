"""How well pictures find their texts, texts their pictures, and pictures their labels.

Legend: n samples, P distinct pictures, T distinct texts, C labels, D features (normalised).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KS = (1, 5, 10)
_BLOCK = 1024


def retrieval(
    image: Tensor, text: Tensor, images: NDArray[np.int64], texts: NDArray[np.int64]
) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways, and their mean, as shares.

    Candidates are the distinct texts (pictures); a query is answered where one of its own is among
    the first k (as for the five captions of COCO's pictures). What is as similar as the best of its
    own stands before it, so that equal features find nothing.

    Args:
        image: (n, D).
        text: (n, D).
        images: (n,) the same number for the same picture.
        texts: (n,) the same number for the same text.
    """
    first_image, image_of = np.unique(images, return_index=True, return_inverse=True)[1:]
    first_text, text_of = np.unique(texts, return_index=True, return_inverse=True)[1:]
    related = torch.zeros(len(first_image), len(first_text), dtype=torch.bool, device=image.device)
    related[torch.from_numpy(image_of), torch.from_numpy(text_of)] = True
    pictures, sentences = image[torch.from_numpy(first_image)], text[torch.from_numpy(first_text)]
    found = {}
    for way, queries, keys, right in (
        ("image_to_text", pictures, sentences, related),
        ("text_to_image", sentences, pictures, related.T),
    ):
        ranks = torch.cat(
            [
                _ranks(queries[i : i + _BLOCK] @ keys.T, right[i : i + _BLOCK])
                for i in range(0, len(queries), _BLOCK)
            ]
        )
        for k in KS:
            found[f"{way}_R@{k}"] = float((ranks < k).double().mean())
    return {"retrieval": sum(found.values()) / len(found), **found}


def alikeness(features: Tensor) -> float:
    """Mean cosine between two different ones of (n, D) features, n >= 2; 1: all are the same."""
    n = len(features)
    total = features.double().sum(0).square().sum()
    return float((total - n) / (n * (n - 1)))


def chance(images: NDArray[np.int64], texts: NDArray[np.int64]) -> float:
    """The mean recall (`retrieval`) of a random ranking; arguments as there."""
    pairs = np.unique(np.stack([images, texts]), axis=1)
    shares = []
    for queries, keys in (pairs, pairs[::-1]):
        answers = np.unique(queries, return_counts=True)[1]
        candidates = len(np.unique(keys))
        for k in KS:
            drawn = np.arange(min(k, candidates))
            wrong = (candidates - answers[:, None] - drawn).clip(0) / (candidates - drawn)
            shares.append(1 - wrong.prod(1).mean())
    return float(np.mean(shares))


def _ranks(scores: Tensor, right: Tensor) -> Tensor:
    """(R,) of each row's best right answer: wrong ones that score as much or more."""
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return (~(scores < best) & ~right).sum(1)  # NaN is found by nobody


def zero_shot(
    image: Tensor, label_texts: Tensor, labels: Sequence[list[int] | None]
) -> dict[str, float]:
    """Share of labelled pictures with one of their labels first, and among the first five.

    For one label per sample these are accuracy and top-5 accuracy.

    Args:
        image: (n, D).
        label_texts: (C, D).
        labels: n rows; those without a label are left out.
    """
    rows = [row for row, some in enumerate(labels) if some]
    if not rows or len(label_texts) < 2:
        return {}
    right = torch.zeros(len(rows), len(label_texts), dtype=torch.bool, device=image.device)
    for place, row in enumerate(rows):
        right[place, labels[row]] = True
    ranks = _ranks(image[rows] @ label_texts.T, right)
    return {
        "zero_shot": float((ranks < 1).double().mean()),
        "zero_shot_top5": float((ranks < 5).double().mean()),
    }
