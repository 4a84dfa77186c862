"""The bare forward rate on ready tensors: what an extraction would reach if decoding, reading and
writing cost nothing."""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from mmc.extract.jobs import encode_images, encode_texts
from mmc.extract.lanes import Lane

SHORTEST_RUN_SECONDS = 3.0
"""After shorter runs the measurement would say little and cost much."""
FEWEST_BATCHES = 10
"""The same, for each encoder thread."""
BUDGET_SECONDS = 2.0


def forward_seconds(
    lanes: Sequence[Lane], device: torch.device, encoders: int, run_seconds: float
) -> float | None:
    """Seconds that the batches of this run take on ready tensors, with as many encoder threads.

    One batch of each shape is run again, for at most about two seconds in all, the shapes with the
    most work first; shapes that there is no time for are taken at the mean speed per token.

    Returns:
        None when the run of ``run_seconds`` was too short to be worth it.
    """
    batches = sum(lane.batches.total() for lane in lanes)
    if run_seconds < SHORTEST_RUN_SECONDS or batches < FEWEST_BATCHES * encoders:
        return None
    shapes = [(lane, length) for lane in lanes for length in lane.batches]
    shapes.sort(key=lambda shape: -shape[0].batches[shape[1]] * max(shape[1], 1))
    deadline = time.perf_counter() + BUDGET_SECONDS
    total, per_token, measured = 0.0, dict[int, list[float]](), 0
    for lane, length in shapes:
        left = deadline - time.perf_counter()
        speeds = per_token.setdefault(id(lane), [])
        if left <= 0 and speeds:
            seconds = length * sum(speeds) / len(speeds)
        else:
            share = max(left, 0.0) / (len(shapes) - measured)
            seconds = _seconds_per_batch(_forward(lane, length, device), device, encoders, share)
            measured += 1
            speeds.append(seconds / max(length, 1))
        total += lane.batches[length] * seconds
    return total


def _forward(lane: Lane, length: int, device: torch.device) -> Callable[[], object]:
    """One forward pass of the lane over a batch of its own shape."""
    tokens = lane.samples[length]
    if tokens is not None:
        return partial(encode_texts, lane, tokens)
    size = (lane.batch_size, 3, *lane.geometry.size)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8).to(device)
    return partial(encode_images, lane, pixels)


def _seconds_per_batch(
    forward: Callable[[], object], device: torch.device, encoders: int, budget: float
) -> float:
    """Wall seconds per batch with ``encoders`` threads that run batches for ``budget`` seconds."""
    counts = [0] * encoders
    _synchronize(device)
    start = time.perf_counter()

    def loop(thread: int) -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            while counts[thread] == 0 or time.perf_counter() - start < budget:
                forward()
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
