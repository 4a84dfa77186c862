"""What a run says of samples that it was not trained on, and how that is joined with our own view.

Legend: n samples, C labels.
"""

from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from mmc.heads.labels.material import Bools, Ints, Material, Progress
from mmc.heads.predict import Predictor
from mmc.heads.runfiles import OUT_OF_FOLD
from mmc.heads.temperature import probabilities
from mmc.heads.thresholds import decide

if TYPE_CHECKING:
    from mmc.heads.artifact import Run

JOIN_ENTRIES = 1 << 20
"""Decisions that the weights of the join are fitted to."""
LEAST = 1e-6


class RunView:
    """A run's answers for the samples of a material, in the order of the store's labels.

    Args:
        trained: whether it is asked about samples that trained it, too.

    Raises:
        InputError: the store has a label that the run does not know.
    """

    def __init__(
        self, run: "Run", material: Material, progress: Progress, *, trained: bool = True
    ) -> None:
        run.check_labels(material.label_set, material.store.path)
        place = {label: index for index, label in enumerate(run.label_set)}
        self.columns = [place[label] for label in material.label_set]
        n = len(material)
        self.probabilities = torch.full((n, len(self.columns)), torch.nan)
        """float32 (n, C), NaN where the run's features are not there."""
        self.decisions = np.zeros((n, len(self.columns)), bool)
        predictor = Predictor(run, material.store, device=material.device)
        step = predictor.batch
        asked = np.arange(n) if trained else np.flatnonzero(~material.train)
        for start in range(0, len(asked), step):
            part = asked[start : start + step]
            part = part[predictor.done(material.rows[part])]
            logits = predictor.logits(material.rows[part]).cpu()
            p = probabilities(logits, run.task, run.temperature)
            places = torch.from_numpy(part)
            self.probabilities[places] = p[:, self.columns]
            self.decisions[places.numpy()] = decide(p, run.task, run.thresholds)[
                :, self.columns
            ].numpy()
            progress("ask the run", min(start + step, len(asked)), len(asked))
        self.unseen: Bools = ~material.train & ~self.probabilities[:, 0].isnan().numpy()
        """(n,) samples that did not train what the probabilities come from: those of other splits,
        and those that were held out of a fold."""
        self.out_of_fold: Bools = np.zeros(n, bool)
        """(n,) the latter."""
        self._take_out_of_fold(run, material)

    def _take_out_of_fold(self, run: "Run", material: Material) -> None:
        """Take what was said of train and val samples by heads that had not seen them."""
        if run.path is None or not (run.path / OUT_OF_FOLD).exists():
            return
        held = run.out_of_fold()
        ids = material.store.column("id").take(pa.array(material.rows)).combine_chunks()
        at = pc.index_in(ids, value_set=held.ids.cast(ids.type))
        places = np.flatnonzero(at.is_valid().to_numpy(zero_copy_only=False))
        rows = torch.from_numpy(at.drop_null().to_numpy().astype(np.int64))
        p = held.probabilities[rows]
        self.probabilities[torch.from_numpy(places)] = p[:, self.columns]
        self.decisions[places] = decide(p, run.task, run.thresholds)[:, self.columns].numpy()
        self.unseen[places] = self.out_of_fold[places] = True


def join(
    own: Tensor, run: Tensor, targets: Tensor, task: str
) -> tuple[Tensor, Literal["own", "run", "both"]]:
    """Two opinions as one: log odds weighted by what they proved worth on the labels given.

    Args:
        own, run: probabilities float32 (n, C).
        targets: int8 (n, C) of 0 and 1, -1 where a label is not known.

    Returns:
        float32 (n, C), and what it is made of: one alone where the other adds nothing.
    """
    from sklearn.linear_model import LogisticRegression

    stride = max(1, -(-own.numel() // JOIN_ENTRIES))
    y = targets[::stride].reshape(-1)
    known = y >= 0
    told = y[known].numpy()
    if not len(told) or told.min() == told.max():
        return own, "own"
    odds = (_log_odds(p[::stride]).ravel()[known] for p in (own, run))
    both = torch.stack([*odds], 1)
    fit = LogisticRegression(C=1.0).fit(both.double().numpy(), told)
    weights, bias = fit.coef_[0], float(fit.intercept_[0])
    if weights.min() <= 0:  # one of them is better alone
        if weights[0] >= weights[1]:
            return own, "own"
        return run.clamp(LEAST, 1 - LEAST), "run"
    out = torch.empty_like(own)
    step = max(1, JOIN_ENTRIES // own.shape[1])
    for at in (slice(i, i + step) for i in range(0, len(own), step)):
        joined = _log_odds(own[at]) * float(weights[0]) + _log_odds(run[at]) * float(weights[1])
        joined += bias
        out[at] = joined.sigmoid() if task == "multilabel" else joined.softmax(1)
    return out.clamp_(LEAST, 1 - LEAST), "both"


def _log_odds(p: Tensor) -> Tensor:
    return p.clamp(LEAST, 1 - LEAST).logit()


def run_opinion(view: RunView, places: Ints) -> tuple[Ints, Tensor]:
    """Which of ``places`` the run did not see (positions in them), and what it says: (m, C)."""
    at = np.flatnonzero(view.unseen[places])
    return at, view.probabilities[torch.from_numpy(places[at])]
