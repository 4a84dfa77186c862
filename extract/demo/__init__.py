"""`mmc demo`: a whole example made from scikit-learn's handwritten digits, without a network."""

from mmc.extract.demo.run import run_demo

__all__ = ["run_demo"]
