"""Probabilities that labels are wrong, by flipping some on purpose.

How far a label is from what the others say does not tell whether it is wrong or merely hard: films
have genres that no plot betrays. So in a copy of the labels one entry of some samples is flipped,
all are judged anew, and at each degree of doubt the flipped ones are set against those that are
doubted as much without having been flipped. That is Bayes' rule, with one assumption: how many
labels are wrong. It is as many as were flipped, or fewer where so many would have been seen: what
looks just like a flipped label is taken for one, so that scores are rather too high than too low.

Legend: n samples, C labels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SHARE = 0.05
"""Samples of which one entry is flipped; at most so many are taken to have a wrong label."""
LEAST_FLIPPED = 0.1
MOST_CERTAIN = 0.99
SHOWN_DOUBT = 0.2
"""Entries that are doubted less play no role."""

Floats = npt.NDArray[np.floating]
Flags = npt.NDArray[np.bool_]
Targets = npt.NDArray[np.int8]


def flip(
    targets: Targets, task: str, random: np.random.Generator, share: float = SHARE
) -> tuple[Targets, Flags]:
    """``targets`` (n, C) with one entry of ``share`` of the samples flipped, and which: (n, C).

    What is not known (-1) stays so.
    Half of them lose a label that they have and half get one that they have not, but none its last
    one unless there is no other label; with one label per sample they get another one.
    """
    wrong = np.zeros(targets.shape, bool)
    count = max(1, round(share * len(targets)))
    for row in random.choice(len(targets), count, replace=False):
        has, lacks = np.flatnonzero(targets[row] == 1), np.flatnonzero(targets[row] == 0)
        if task != "multilabel":
            if len(lacks):
                wrong[row, random.choice(lacks)] = wrong[row, has] = True
            continue
        drop = random.random() < 0.5 and len(has) > 1
        known = has if drop or not len(lacks) else lacks
        if len(known):
            wrong[row, random.choice(known)] = True
    return np.where(wrong, 1 - targets, targets).astype(np.int8), wrong


@dataclass(frozen=True)
class Scale:
    """Turns doubts into probabilities that a label is wrong."""

    doubts: Floats
    """Ascending (m,)."""
    scores: Floats
    """(m,), ascending too."""
    share: float
    """Share of the samples that are taken to have such an error."""

    def __call__(self, doubts: npt.ArrayLike) -> Floats:
        """Probabilities of the same shape."""
        found: Floats = np.interp(np.asarray(doubts, np.float64), self.doubts, self.scores)
        return found


def fit_scale(doubts: Floats, wrong: Flags, trials: int = 1) -> Scale:
    """The scale by entries of which some were flipped on purpose.

    Args:
        doubts: probabilities that the entries are not as they are, (m,).
        wrong: whether they were flipped, (m,).
        trials: how often the same entries are among them, flipped anew.
    """
    from sklearn.isotonic import IsotonicRegression

    if not wrong.any():
        return Scale(np.array([1.0]), np.array([0.0]), SHARE)
    # One more that is not wrong, at the top: a few flipped ones there make no certainty.
    x = np.append(_log_odds(doubts), 20.0)
    fit = IsotonicRegression(out_of_bounds="clip").fit(x, np.append(wrong, False))
    points, flipped = fit.X_thresholds_, fit.y_thresholds_
    odds = flipped / np.maximum(1 - flipped, 1e-9)
    most = _at_most(doubts, wrong, trials)
    return Scale(1 / (1 + np.exp(-points)), np.clip(most * odds, 0, MOST_CERTAIN), most * SHARE)


def _at_most(doubts: Floats, wrong: Flags, trials: int) -> float:
    """How many labels can be wrong at most, as a share of those flipped in a trial; 1 at most.

    Among the labels that are doubted most there are no more wrong ones than there are labels that
    nobody flipped, and one. A tenth of the flipped ones must be as doubted, for chance.
    """
    order = np.argsort(-doubts, kind="stable")
    flipped = np.cumsum(wrong[order]) / trials
    others = np.cumsum(~wrong[order]) / trials
    there = flipped >= max(1.0, LEAST_FLIPPED * flipped[-1])
    if not there.any():
        return 1.0
    return float(min(1.0, ((others[there] + 1) / flipped[there]).min()))


def _log_odds(p: Floats) -> Floats:
    clipped = np.clip(p.astype(np.float64), 1e-7, 1 - 1e-7)
    return np.log(clipped / (1 - clipped))
