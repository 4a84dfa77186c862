"""The bare forward rate on ready tensors: what an extraction would reach if decoding, reading and
writing cost nothing."""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from mmc.extract.forward import Ran

SHORTEST_RUN_SECONDS = 10.0
"""After shorter runs the measurement would say little and cost much."""
FEWEST_BATCHES = 10
"""The same, for each encoder thread."""
BUDGET_SECONDS = 2.0


def forward_seconds(
    ran: Sequence[Ran], device: torch.device, encoders: int, run_seconds: float
) -> float | None:
    """Seconds that the batches of this run take on ready tensors, with as many encoder threads.

    One batch of each shape is run again, for at most about two seconds in all, the shapes with the
    most work first; shapes that there is no time for are taken at the mean speed per token.

    Returns:
        None when the run of ``run_seconds`` was too short to be worth it.
    """
    batches = sum(kind.count for kind in ran)
    if run_seconds < SHORTEST_RUN_SECONDS or batches < FEWEST_BATCHES * encoders:
        return None
    kinds = sorted(ran, key=lambda kind: -kind.count * max(kind.step.length, 1))
    deadline = time.perf_counter() + BUDGET_SECONDS
    total, per_token, measured = 0.0, dict[Any, list[float]](), 0
    for kind in kinds:
        left = deadline - time.perf_counter()
        speeds = per_token.setdefault((kind.step.alias, kind.step.towers), [])
        if left <= 0 and speeds:
            seconds = kind.step.length * sum(speeds) / len(speeds)
        else:
            share = max(left, 0.0) / (len(kinds) - measured)
            seconds = _seconds_per_batch(_forwards(kind, device), device, encoders, share)
            measured += 1
            speeds.append(seconds / max(kind.step.length, 1))
        total += kind.count * seconds
    return total


def _forwards(kind: Ran, device: torch.device) -> list[Callable[[], object]]:
    """Forward passes of one kind, over batches of its own shape."""
    transform = kind.step.backbone.image_transform
    if kind.step.towers == ("text",) or transform is None:
        return [partial(kind.step.run, None, kind.tokens)]
    if transform.shape is None:
        return [partial(kind.step.run, pictures, kind.tokens) for pictures in kind.pictures]
    size = (kind.step.batch_size, *transform.shape)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8).to(device)
    return [partial(kind.step.run, pixels, kind.tokens)]


def _seconds_per_batch(
    forwards: Sequence[Callable[[], object]], device: torch.device, encoders: int, budget: float
) -> float:
    """Wall seconds per batch with ``encoders`` threads that run batches for ``budget`` seconds."""
    counts = [0] * encoders
    _synchronize(device)
    start = time.perf_counter()

    def loop(thread: int) -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            while counts[thread] == 0 or time.perf_counter() - start < budget:
                forwards[counts[thread] % len(forwards)]()
                _synchronize(device)
                counts[thread] += 1

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(encoders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - start) / sum(counts)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
