"""Pictures of handwritten digits on textured grounds, drawn in batches.

The digits are the 1,797 scans of 8 x 8 pixels that scikit-learn ships. Each is enlarged, turned a
little and laid on a ground of random texture; everything is vectorised over the batch, so that
training can draw every picture anew.

Shapes: B pictures, K = 3 slots for digits, S = 64 pixels a side.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 64
"""Width and height of a picture, in pixels."""
MAX_DIGITS = 3
SPLITS = {"backbone": 0.55, "train": 0.2, "val": 0.1, "test": 0.15}
"""Share of the scans that each part draws from; no scan is in two parts."""
_SCAN_SIDE = 32
_SIZES = (20.0, 30.0)  # side of an enlarged scan in pixels; three of the largest still fit


@dataclass(frozen=True)
class Scans:
    """Scans of single digits: ``ink`` (n, 1, 32, 32) float32 in [0, 1], ``digit`` (n,) int64."""

    ink: Tensor
    digit: np.ndarray


def load_scans() -> Scans:
    """All scans of scikit-learn's digits, enlarged four times with bicubic interpolation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    ink = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    ink = F.interpolate(ink, size=(_SCAN_SIDE, _SCAN_SIDE), mode="bicubic", align_corners=False)
    return Scans(ink.clamp_(0, 1), digits.target.astype(np.int64))


def split_scans(scans: Scans, seed: int) -> dict[str, list[np.ndarray]]:
    """Scan numbers of each part in ``SPLITS``: a list of ten arrays, one per digit."""
    rng = np.random.default_rng([seed, 0])
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for digit in range(10):
        numbers = rng.permutation(np.flatnonzero(scans.digit == digit))
        ends = np.rint(np.cumsum(list(SPLITS.values())) * len(numbers)).astype(int)
        pieces = np.split(numbers, ends[:-1])
        for name, piece in zip(SPLITS, pieces, strict=True):
            parts[name].append(piece)
    return parts


def random_digits(count: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """Sets of one to ``most`` different digits in random order: (count, most) int64, -1 = none."""
    digits = rng.random((count, 10)).argsort(1)[:, :most]
    used = rng.integers(1, most + 1, (count, 1))
    return np.where(np.arange(most) < used, digits, -1)


def choose_scans(
    pools: list[np.ndarray], digits: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A random scan of each digit. ``digits`` (B, K) int64, -1 = empty slot; so is the result."""
    chosen = np.full_like(digits, -1)
    for digit, pool in enumerate(pools):
        here = digits == digit
        chosen[here] = rng.choice(pool, size=int(here.sum()))
    return chosen


def _places(
    used: np.ndarray, canvas: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Random centres (B, K, 2) and sides (B, K) in pixels such that no two used slots overlap."""
    count, slots = used.shape
    tries = 48
    side = rng.uniform(*_SIZES, (count, tries, slots))
    low = side[..., None] / 2
    centre = low + rng.random((count, tries, slots, 2)) * (canvas - 2 * low)
    good = np.ones((count, tries), bool)
    for a, b in itertools.combinations(range(slots), 2):
        apart = np.abs(centre[:, :, a] - centre[:, :, b]).max(-1)
        free = apart >= (side[:, :, a] + side[:, :, b]) / 2
        good &= free | ~(used[:, a] & used[:, b])[:, None]
    # The last try is a corner arrangement that always fits.
    corners = canvas * np.array([[0.25, 0.25], [0.75, 0.25], [0.5, 0.75]])
    centre[:, -1], good[:, -1] = corners[:slots] if slots > 1 else canvas / 2, True
    first = good.argmax(1)
    rows = np.arange(count)
    return centre[rows, first], side[rows, first]


def _ground(count: int, canvas: int, generator: torch.Generator) -> Tensor:
    """Textured grounds (B, 3, S, S), float32 in [0, 1]: blotches, grain, ruled lines and a tint."""
    tint = 0.12 * torch.randn((count, 3, 1, 1), generator=generator)
    level = 0.15 + 0.7 * torch.rand((count, 1, 1, 1), generator=generator)
    ground = (level + tint).expand(count, 3, canvas, canvas).clone()
    for cells, strength in ((3, 0.09), (8, 0.06), (20, 0.04), (canvas, 0.03)):
        noise = torch.randn((count, 1, cells, cells), generator=generator)
        if cells != canvas:
            noise = F.interpolate(
                noise, size=(canvas, canvas), mode="bilinear", align_corners=False
            )
        share = torch.rand((count, 1, 1, 1), generator=generator)
        ground += 2 * strength * share * noise
    angle = torch.pi * torch.rand((count, 1, 1), generator=generator)
    pitch = 4 + 10 * torch.rand((count, 1, 1), generator=generator)
    depth = 0.08 * torch.rand((count, 1, 1), generator=generator)
    y, x = torch.meshgrid(torch.arange(canvas), torch.arange(canvas), indexing="ij")
    lines = torch.sin((x * angle.cos() + y * angle.sin()) * (2 * torch.pi / pitch))
    ground += (depth * lines).unsqueeze(1)
    return ground.clamp_(0, 1)


def _ink_grid(
    centre: np.ndarray, side: np.ndarray, canvas: int, rng: np.random.Generator
) -> Tensor:
    """Where each pixel of each slot reads its scan: (B * K, S, S, 2) in grid_sample's [-1, 1]."""
    turn = np.deg2rad(rng.uniform(-10, 10, side.shape))
    slant = rng.uniform(-0.15, 0.15, side.shape)
    cos, sin = np.cos(turn), np.sin(turn)
    matrix = np.stack([cos + slant * sin, sin - slant * cos, -sin, cos], -1) * (2 / side[..., None])
    a, b, c, d = torch.from_numpy(matrix.reshape(-1, 4)).float().T[..., None, None]
    at = torch.from_numpy(centre.reshape(-1, 2)).float()
    pixel = torch.arange(canvas) + 0.5
    x = pixel.view(1, 1, -1) - at[:, 0].view(-1, 1, 1)
    y = pixel.view(1, -1, 1) - at[:, 1].view(-1, 1, 1)
    return torch.stack([a * x + b * y, c * x + d * y], -1)


def draw(scans: Scans, chosen: np.ndarray, rng: np.random.Generator, canvas: int = SIDE) -> Tensor:
    """Pictures that hold the ``chosen`` scans without overlap.

    Args:
        chosen: scan numbers (B, K) int64; -1 = empty slot.
        rng: decides places, sizes, slants, contrast and grounds.

    Returns:
        uint8 (B, 3, S, S), RGB.
    """
    count = len(chosen)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    used = chosen >= 0
    centre, side = _places(used, canvas, rng)
    ink = scans.ink[torch.from_numpy(chosen.clip(0)).flatten()]
    grid = _ink_grid(centre, side, canvas, rng)
    ink = F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    ink = ink.view(*used.shape, canvas, canvas) * torch.from_numpy(used)[:, :, None, None]
    cover = ink.amax(1, keepdim=True)

    ground = _ground(count, canvas, generator)
    level = ground.mean((1, 2, 3), keepdim=True)
    contrast = 0.35 + 0.35 * torch.rand((count, 1, 1, 1), generator=generator)
    # Towards the side with more room, so that the contrast asked for is the contrast there is.
    contrast = torch.where(level > 0.5, -contrast, contrast)
    tint = 0.08 * torch.randn((count, 3, 1, 1), generator=generator)
    picture = ground + cover * (level + contrast + tint - ground)
    return picture.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
