"""What ``torchrun`` says of the processes that it started. Imports no torch."""

import os


def launched() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def launched_here() -> int:
    """Those of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() > 1 else 1


def is_main() -> bool:
    """Whether this process is the only or the first one: the one that reports and writes."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"
