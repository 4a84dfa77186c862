"""Thresholds: equal to brute force, drawn together where data are few, chosen on held-out rows."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmc.heads import cuts as search
from mmc.heads import thresholds
from mmc.heads.cuts import HIGHEST, LOWEST, per_label
from mmc.heads.thresholds import Thresholds, decide, objective_value, tune

HALF = torch.tensor(0.5, dtype=torch.float64)
EXACT = thresholds._Common(0, 0.0)
"""The best common threshold of the rows, not drawn anywhere."""
SHRUNK = thresholds._Common(10, 20.0)


def problem(n: int, c: int, seed: int, *, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Probabilities float32 (n, c) off by ``shift`` logits, and targets int8 (n, c)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, c, generator=generator) * 2 - 1
    targets = (torch.rand(n, c, generator=generator) < torch.sigmoid(logits)).to(torch.int8)
    return torch.sigmoid(logits + shift), targets


small = st.integers(2, 7).flatmap(
    lambda n: st.integers(1, 3).flatmap(
        lambda c: st.tuples(
            st.lists(
                st.lists(
                    st.sampled_from([0.0, 0.005, 0.2, 0.4, 0.5, 0.8, 0.995, 1.0]),
                    min_size=c,
                    max_size=c,
                ),
                min_size=n,
                max_size=n,
            ),
            st.lists(st.lists(st.integers(0, 1), min_size=c, max_size=c), min_size=n, max_size=n),
        )
    )
)
GRID = (0.01, 0.1, 0.3, 0.45, 0.5, 0.6, 0.9, 0.99)
"""One threshold between any two of the values above, and at the ends."""


@given(small)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("objective", ["macro", "micro"])
def test_per_label_equals_brute_force(
    objective: str, data: tuple[list[list[float]], list[list[int]]]
) -> None:
    scores = torch.tensor(data[0], dtype=torch.float64)
    truth = torch.tensor(data[1], dtype=torch.int8)
    common = HALF.expand(scores.shape[1])
    cuts = per_label(scores, truth, objective, common)
    assert ((cuts >= LOWEST) & (cuts <= HIGHEST)).all()
    best = max(
        objective_value(scores >= torch.tensor(grid).double(), truth, objective, binary=False)
        for grid in itertools.product(GRID, repeat=scores.shape[1])
    )
    found = objective_value(scores >= cuts, truth, objective, binary=False)
    assert found == pytest.approx(best, abs=1e-12)


@given(small)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("objective", ["macro", "micro", "samples"])
def test_common_threshold_equals_brute_force(
    objective: str, data: tuple[list[list[float]], list[list[int]]]
) -> None:
    scores = torch.tensor(data[0], dtype=torch.float64)
    truth = torch.tensor(data[1], dtype=torch.int8)
    cuts = EXACT(scores, truth, objective, False)
    best = max(objective_value(scores >= g, truth, objective, binary=False) for g in GRID)
    found = objective_value(scores >= cuts, truth, objective, binary=False)
    assert found == pytest.approx(best, abs=1e-12)


@given(small)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("objective", ["macro", "micro"])
def test_binary_threshold_equals_brute_force(
    objective: str, data: tuple[list[list[float]], list[list[int]]]
) -> None:
    scores = torch.tensor(data[0], dtype=torch.float64)[:, :1]
    truth = torch.tensor(data[1], dtype=torch.int8)[:, :1]
    cuts = EXACT(scores, truth, objective, True)
    best = max(objective_value(scores >= g, truth, objective, binary=True) for g in GRID)
    assert objective_value(scores >= cuts, truth, objective, binary=True) == pytest.approx(best)


def test_samples_ascent_never_falls_below_where_it_starts() -> None:
    for seed in range(5):
        p, targets = problem(80, 6, seed, shift=1.0)
        scores = p.double()
        start = HALF.expand(6)
        cuts = per_label(scores, targets, "samples", start)
        before = objective_value(scores >= start, targets, "samples", binary=False)
        after = objective_value(scores >= cuts, targets, "samples", binary=False)
        assert after > before


def test_the_fine_grid_is_near_the_exact_search(monkeypatch: pytest.MonkeyPatch) -> None:
    p, targets = problem(300, 3, 0, shift=-2.0)
    exact = EXACT(p.double(), targets, "micro", False)
    monkeypatch.setattr(search, "MAX_CUTS", 5)
    grid = EXACT(p.double(), targets, "micro", False)
    values = [
        objective_value(p.double() >= cuts, targets, "micro", binary=False)
        for cuts in (exact, grid)
    ]
    assert values[0] - 0.005 < values[1] <= values[0]


def test_calibrated_scores_want_half_of_the_f1_they_reach() -> None:
    """Lipton et al. 2014: the optimal threshold of calibrated scores is F1* / 2."""
    p, targets = problem(40_000, 1, 0)
    cut = float(EXACT(p.double(), targets, "micro", False))
    reached = objective_value(p.double() >= cut, targets, "micro", binary=False)
    assert cut == pytest.approx(reached / 2, abs=0.03)


def test_shifted_scores_are_corrected_and_the_gain_is_real() -> None:
    p, targets = problem(2_000, 5, 1, shift=-2.0)
    found = tune(p, targets, "multilabel", objective="micro")
    fresh_p, fresh_targets = problem(2_000, 5, 2, shift=-2.0)
    before = objective_value(fresh_p >= 0.5, fresh_targets, "micro", binary=False)
    chosen = decide(fresh_p, "multilabel", found)
    after = objective_value(chosen, fresh_targets, "micro", binary=False)
    assert after > before + 0.05
    # What the cross-fit promised is what fresh data give.
    assert found.held_out[found.mode] == pytest.approx(after, abs=0.02)
    assert found.held_out["default"] == pytest.approx(before, abs=0.02)


def test_labels_off_by_different_amounts_get_their_own() -> None:
    p, targets = problem(3_000, 4, 3)
    shift = torch.tensor([-3.0, -1.0, 1.0, 3.0])
    p = torch.sigmoid(torch.logit(p) + shift)
    found = tune(p, targets, "multilabel", objective="macro")
    assert found.mode == "per_label"
    assert list(found.values) == sorted(found.values)
    assert found.held_out["per_label"] > found.held_out["global"] > 0


def test_good_defaults_are_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(300, 4, generator=generator) < 0.4).to(torch.int8)
    p = 0.1 + 0.8 * targets.float()
    found = tune(p, targets, "multilabel")
    assert (found.mode, found.values) == ("default", (0.5,) * 4)
    assert found.held_out == {"default": 1.0, "global": 1.0, "per_label": 1.0}


def test_rare_labels_take_the_common_threshold() -> None:
    p, targets = problem(2_000, 3, 5, shift=-2.0)
    targets[:, 2] = 0
    targets[:9, 2] = 1
    fit = thresholds._PerLabel(SHRUNK)
    common = SHRUNK(p.double(), targets, "macro", False)
    cuts = fit(p.double(), targets, "macro", False)
    assert cuts[2] == common[2]
    assert cuts[0] != common[0]


def test_shrinkage_is_the_weighted_mean() -> None:
    p, targets = problem(500, 2, 6, shift=-1.0)
    scores = p.double()
    best = EXACT(scores, targets, "macro", False)
    n = targets.sum().double()
    common = SHRUNK(scores, targets, "macro", False)
    torch.testing.assert_close(common, (n * best + 20 * 0.5) / (n + 20))
    own = per_label(scores, targets, "macro", common)
    n = targets.sum(0).double()
    expected = (n * own + 20 * common) / (n + 20)
    found = thresholds._PerLabel(SHRUNK)(scores, targets, "macro", False)
    torch.testing.assert_close(found, expected)
    unshrunk = thresholds._PerLabel(EXACT)(scores, targets, "macro", False)
    torch.testing.assert_close(unshrunk, per_label(scores, targets, "macro", best))


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_a_tiny_validation_set_moves_nothing(task: str) -> None:
    """Nine of the smaller class, however well another threshold would separate them."""
    truth = torch.tensor([1] * 9 + [0] * 60)
    p1 = torch.where(truth == 1, 0.3, 0.1)
    if task == "binary":
        found = tune(torch.stack([1 - p1, p1], 1), truth, task)
    else:
        found = tune(p1[:, None], truth[:, None].to(torch.int8), task)
    assert (found.mode, found.values) == ("default", (0.5,))
    assert found.held_out["global"] == found.held_out["default"]
    # Every third class swapped: the few may be the negatives as well.
    swapped = tune(torch.stack([p1, 1 - p1], 1), 1 - truth, "binary")
    assert swapped.values == (0.5,)


@pytest.mark.parametrize("copies", [8, 400])
def test_a_small_validation_set_moves_the_binary_threshold_part_of_the_way(copies: int) -> None:
    truth = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 0, 0] * copies)
    p1 = torch.where(truth == 1, 0.45, 0.1)
    found = tune(torch.stack([1 - p1, p1], 1), truth, "binary")
    few = 5 * copies
    assert found.values[0] == pytest.approx((few * 0.275 + 20 * 0.5) / (few + 20))


def test_ties_go_to_the_cut_nearest_the_common_one() -> None:
    # Cutting at .15 or at .85 both give F1 = 2/3; the common threshold decides.
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.2], [0.1]], dtype=torch.float64)
    truth = torch.tensor([[1], [0], [0], [1], [0]], dtype=torch.int8)
    f1 = [objective_value(scores >= cut, truth, "macro", binary=False) for cut in (0.15, 0.85)]
    assert f1 == [pytest.approx(2 / 3)] * 2
    low = per_label(scores, truth, "macro", torch.tensor([0.1], dtype=torch.float64))
    high = per_label(scores, truth, "macro", torch.tensor([0.9], dtype=torch.float64))
    assert (float(low), float(high)) == (pytest.approx(0.15), pytest.approx(0.85))


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("objective", ["micro", "macro", "samples"])
def test_constant_scores_do_not_crash(value: float, objective: str) -> None:
    targets = (torch.arange(60).reshape(20, 3) % 2).to(torch.int8)
    found = tune(torch.full((20, 3), value), targets, "multilabel", objective=objective)
    assert all(LOWEST <= v <= HIGHEST for v in found.values)


@pytest.mark.parametrize("task", ["multilabel", "binary", "multiclass"])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_too_few_rows_keep_the_default(task: str, n: int) -> None:
    targets = torch.ones(n, 2, dtype=torch.int8) if task == "multilabel" else torch.ones(n).long()
    found = tune(torch.full((n, 2), 0.5), targets, task)
    assert found == Thresholds.default(task, 2)


def test_unknown_entries_are_as_if_they_were_not_there() -> None:
    p, targets = problem(400, 3, 7, shift=-1.0)
    masked = targets.clone()
    masked[:50] = -1
    alone = EXACT(p[50:].double(), targets[50:], "samples", False)
    scores, truth = thresholds._mask_unknown(p, masked)
    assert float(EXACT(scores, truth, "samples", False)[0]) == float(alone[0])
    masked[60:100, 1] = -1
    scores, truth = thresholds._mask_unknown(p, masked)
    keep = torch.cat([torch.arange(50, 60), torch.arange(100, 400)])
    for column, rows in ((0, torch.arange(50, 400)), (1, keep)):
        alone = EXACT(
            p[rows, column : column + 1].double(),
            targets[rows, column : column + 1],
            "macro",
            False,
        )
        masked_out = EXACT(
            scores[:, column : column + 1], truth[:, column : column + 1], "macro", False
        )
        assert float(alone) == float(masked_out)


def test_same_seed_same_thresholds() -> None:
    p, targets = problem(300, 5, 8, shift=-1.0)
    assert tune(p, targets, "multilabel", seed=3) == tune(p, targets, "multilabel", seed=3)


class Largest(TorchDispatchMode):
    """Notes how many bytes the largest tensor has that is made meanwhile."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("objective", ["micro", "macro"])
@pytest.mark.parametrize("unknown", [0.0, 0.2])
def test_blocks_of_labels_change_nothing_and_bound_what_is_made(
    monkeypatch: pytest.MonkeyPatch, objective: str, unknown: float
) -> None:
    scores, truth = problem(300, 700, 5, shift=1.0)
    truth[torch.rand(truth.shape, generator=torch.Generator().manual_seed(0)) < unknown] = -1
    monkeypatch.setattr(search, "BLOCK_ENTRIES", 1 << 40)
    monkeypatch.setattr(search, "MAX_SCORES", 50)  # more have a grid
    whole = {
        mode: tune(scores, truth, "multilabel", objective=objective, mode=mode)
        for mode in ("global", "per_label")
    }
    monkeypatch.setattr(search, "BLOCK_ENTRIES", 20_000)
    for mode, expected in whole.items():
        with Largest() as largest:
            found = tune(scores, truth, "multilabel", objective=objective, mode=mode)
        assert found == expected
        # The same in float64 would have eight bytes of each score, macro-F1 has them of each cut.
        if objective == "micro":
            assert 0 < largest.bytes < 8 * scores.numel()


def test_binary_reads_the_second_class() -> None:
    p1, targets = problem(2_000, 1, 9, shift=-2.0)
    p = torch.cat([1 - p1, p1], 1)
    truth = targets[:, 0].long()
    truth[:5] = -1
    found = tune(p, truth, "binary")
    assert (found.mode, found.objective, len(found.values)) == ("global", "macro", 1)
    assert found.values[0] < 0.3
    assert (decide(p, "binary", found).sum(1) == 1).all()
    assert torch.equal(decide(p, "binary", found)[:, 1], p1[:, 0].double() >= found.values[0])


def test_multiclass_is_arg_max() -> None:
    p = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    found = tune(p, torch.tensor([1, 0]), "multiclass")
    assert (found.mode, found.values) == ("argmax", ())
    assert decide(p, "multiclass", found).tolist() == [[False, True, False], [True, False, False]]


def test_at_least_one_fills_only_empty_rows() -> None:
    p = torch.tensor([[0.2, 0.4], [0.9, 0.8]])
    cuts = Thresholds.default("multilabel", 2)
    assert decide(p, "multilabel", cuts).tolist() == [[False, False], [True, True]]
    filled = decide(p, "multilabel", cuts, at_least_one=True)
    assert filled.tolist() == [[False, True], [True, True]]


def test_json_round_trip() -> None:
    p, targets = problem(300, 3, 10)
    found = tune(p, targets, "multilabel")
    assert Thresholds.from_json(found.to_json()) == found


def test_a_way_may_be_asked_for():
    torch.manual_seed(0)
    truth = (torch.rand(400, 3) < 0.3).to(torch.int8)
    noise = torch.rand(400, 3) * 0.3
    p = truth * torch.tensor([0.1, 0.3, 0.5]) + noise + torch.tensor([0.0, 0.2, 0.4])
    free = tune(p.clamp(0, 1), truth, "multilabel")
    assert free.mode == "per_label"
    common = tune(p.clamp(0, 1), truth, "multilabel", mode="global")
    assert (common.mode, len(set(common.values))) == ("global", 1)
    assert common.held_out == {"global": free.held_out["global"]}
