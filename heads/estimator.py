"""A head as a scikit-learn classifier.

Legend: n samples, C labels, D values.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import check_is_fitted, validate_data

from mmc.heads import memory
from mmc.heads.arraystore import FIELD, ArrayStore, fields_of
from mmc.heads.artifact import Run
from mmc.heads.classes import Classes
from mmc.heads.fields import Fields, as_fields
from mmc.heads.holdout import hold_out
from mmc.heads.models import GROUP, HEADS
from mmc.heads.models.base import Head
from mmc.heads.options import PredictConfig, TrainConfig
from mmc.heads.parameters import config_of, nested, params_of, split_nested
from mmc.heads.predict import Predictions, aligned_targets, predict
from mmc.heads.smalldata import for_tables, whole
from mmc.heads.storerows import StoreRows
from mmc.heads.trainer import stage_lines
from mmc.heads.training import Setup
from mmc.heads.trainreport import effort
from mmc.store import EmbeddingStore
from mmc.store.errors import InputError, RowsNotDoneError
from mmc.store.registry import load, lookup

Array = npt.NDArray[Any]

MANY_ROWS = 10_000
"""From so many on, a tenth can be spared; scikit-learn's gradient boosting has the same limit."""


class HeadClassifier(ClassifierMixin, BaseEstimator):
    """Trains a head as ``mmc train-head`` does, and predicts as ``mmc predict`` does.

    X is one of:

    - an array (n, D), or a data frame: one field, for heads that need no second one;
    - a dictionary of arrays (n, ...) by field, ``{"image": ..., "text_tokens": ..., "text_mask":
      ...}``, or `Fields` of it, which scikit-learn can divide by rows (``cross_val_score``). A head
      reads what it reads of a store with these fields; ``features`` chooses among them;
    - an :class:`mmc.store.EmbeddingStore`: labels and splits are the store's.

    y holds a class per sample, of any type; or 0 and 1 for each label, (n, C), with -1 where it is
    not known. (In a y of classes -1 is a class.)

    Embeddings are brought to unit length first. An X that is one array of fewer than 32 columns, or
    in which one column has more than half of all the variance, is taken for a table of
    measurements instead: each column is brought to mean 0 and variance 1, no inputs are dropped
    and weights decay less (head.normalize=zscore, head.input_dropout=0, optim.weight_decay=0.1),
    unless ``settings`` says otherwise.

    Args:
        head: name of the head (`mmc list heads`).
        features: what it reads of X: field, alias/field or role=alias/field; None: what the head
            takes of a store by default.
        loss, batch_size, epochs, lr, precision, device, max_memory: as in
            :class:`mmc.heads.options.TrainConfig`.
        settings: of the head, the loss and the optimiser, by ``group.key`` as ``--set`` takes them:
            ``{"head.hidden": 512, "optim.weight_decay": 0.1}`` (`mmc list heads NAME` describes
            those of a head). Each is a parameter as well, ``head__hidden``, for ``set_params`` and
            grids.
        random_state: seed of the held-out rows, the initialisation and the order; the same number
            gives the same weights. None: another one each time.
        validation_fraction: of the rows of arrays, held out of each class to stop the training by,
            keep its best state and tune the thresholds; None: no row is, all train to the end, and
            thresholds are 0.5. "auto": 0.1 from 10,000 rows on, where there are several labels per
            sample, whose thresholds need it, and for heads that decide by such rows (boost,
            ensemble); else None. (A store has its own, and X_val is used in any case.)
        verbose: print what ``mmc train-head`` says.

    Attributes:
        run_: the trained :class:`mmc.heads.artifact.Run`, with metrics on the validation rows.
        classes_: (C,) the classes, or the labels' names or column numbers.
        n_features_in_, feature_names_in_: of an X that is one array.
    """

    def __init__(
        self,
        head: str = "linear",
        *,
        features: Sequence[str] | None = None,
        loss: str | None = None,
        batch_size: int | None = None,
        epochs: int | None = None,
        lr: float | None = None,
        settings: Mapping[str, Any] | None = None,
        random_state: int | np.random.RandomState | None = 0,
        validation_fraction: float | Literal["auto"] | None = "auto",
        precision: Literal["auto", "bf16", "float32"] = "auto",
        device: str = "auto",
        max_memory: str | None = None,
        verbose: bool = False,
    ) -> None:
        self.head = head
        self.features = features
        self.loss = loss
        self.batch_size = batch_size
        self.epochs = epochs
        self.lr = lr
        self.settings = settings
        self.random_state = random_state
        self.validation_fraction = validation_fraction
        self.precision = precision
        self.device = device
        self.max_memory = max_memory
        self.verbose = verbose

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Parameters by name; deep: each setting as well, as ``head__hidden``."""
        params: dict[str, Any] = super().get_params(deep=deep)
        return {**params, **nested(self.settings)} if deep else params

    def set_params(self, **params: Any) -> Self:
        """Set parameters, and settings by two underscores; other settings stay as they are.

        Raises:
            ValueError: no such parameter. (Settings are checked when the head is fitted.)
        """
        own, settings = split_nested(params)
        super().set_params(**own)
        if settings:
            self.settings = {**(self.settings or {}), **settings}
        return self

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        X_val: Any = None,
        y_val: Any = None,
        rows: npt.ArrayLike | None = None,
    ) -> Self:
        """Train.

        Args:
            X, y: see the class; y is left out with a store.
            X_val, y_val: validate on these instead of held-out rows.
            rows: of a store, those to use, each for what its split says.

        Raises:
            InputError (a ValueError): anything that the caller can set right.
            MmcError: training diverged.
        """
        config = config_of(self.get_params(deep=False))
        if isinstance(X, EmbeddingStore):
            if any(value is not None for value in (y, X_val, y_val)):
                raise InputError(
                    "labels and splits come from the store: leave out y, X_val and y_val"
                )
            self._forget_columns()
            store: Any = X if rows is None else StoreRows(X, rows)
            classes = Classes(X.task, np.array(X.label_set))
        else:
            if rows is not None:
                raise InputError("rows are those of a store; index X and y instead")
            store, classes = self._arrays(config, X, y, X_val, y_val)
            config = replace(
                config,
                features=store.full_names(config.features),
                settings=(*config.settings, *for_tables(config, store)),
            )
        # Building heads draws random numbers, and the engine sets seeds: the caller's stay.
        with torch.random.fork_rng([]):
            self.run_ = self._train(store, config)
        self._classes = classes
        self.classes_ = classes.values
        return self

    def predict(self, X: Any, *, rows: npt.ArrayLike | None = None) -> Array:
        """Classes (n,), or multi-hot int64 (n, C), at the tuned thresholds.

        Args:
            X: what was fitted on: arrays, or a store.
            rows: of a store; default: all of its samples.

        Raises:
            InputError (a ValueError): X is not what was fitted on.
            RowsNotDoneError: rows of a store hold no features.
        """
        decisions = self._predictions(X, rows).decisions.numpy()
        return self._classes.decode(decisions)

    def predict_proba(
        self, X: Any, *, rows: npt.ArrayLike | None = None
    ) -> npt.NDArray[np.float32]:
        """Probabilities (n, C); rows sum to 1 unless there are several labels per sample."""
        p: npt.NDArray[np.float32] = self._predictions(X, rows).probabilities.numpy()
        return p

    def decision_function(
        self, X: Any, *, rows: npt.ArrayLike | None = None
    ) -> npt.NDArray[np.float64]:
        """Log-odds above those of the threshold: (n,) of the second of two classes, (n, C) of the
        labels where there are several per sample. Of more than two classes: logits (n, C).

        Above 0, or the largest, is what `predict` says.
        """
        logits: npt.NDArray[np.float64] = self._predictions(X, rows).logits.double().numpy()
        run: Run = self.run_
        if run.task == "multiclass":
            return logits
        cuts = np.array(run.thresholds.values)
        # A threshold of 0 or 1 is passed always or never, but not by an infinity: 0 x inf is NaN.
        cuts = np.clip(cuts, np.finfo(np.float64).tiny, 1 - np.finfo(np.float64).eps)
        cuts = np.log(cuts) - np.log1p(-cuts)
        odds = logits[:, 1:] - logits[:, :1] if run.task == "binary" else logits
        odds = odds / run.temperature
        above: npt.NDArray[np.float64] = odds - cuts
        return above[:, 0] if run.task == "binary" else above

    def score(
        self,
        X: Any,
        y: Any = None,
        sample_weight: npt.ArrayLike | None = None,
        *,
        rows: npt.ArrayLike | None = None,
    ) -> float:
        """Accuracy; with several labels per sample the share of samples with every label right.

        Labels that are not known are no error; samples without any known one do not count.

        Args:
            X, y: as in `fit`.
            sample_weight: (n,).
            rows: of a store; default: those of its test split that have labels and features; where
                there are none those of val, which is said with a warning.

        Raises:
            InputError (a ValueError): a store with neither, or what `predict` raises.
        """
        check_is_fitted(self)
        if isinstance(X, EmbeddingStore):
            if y is not None:
                raise InputError("labels come from the store: leave out y")
            chosen = self._scored(X) if rows is None else np.asarray(rows, np.int64)
            decisions = self._predictions(X, chosen).decisions.numpy()
            truth = aligned_targets(self.run_, X, chosen).numpy()
        elif self.run_.task != "multilabel":
            return float(super().score(X, y, sample_weight))
        else:
            decisions = self._predictions(X, rows).decisions.numpy()
            truth = self._classes.encode(y, len(decisions))
        right = (decisions == truth) | (truth < 0)
        known = (truth >= 0).any(1)
        if not known.any():
            raise InputError("no sample has known labels: there is nothing to score")
        weights = np.ones(len(truth)) if sample_weight is None else np.asarray(sample_weight)
        check_consistent_length(truth, weights)
        return float(np.average(right.all(1)[known], weights=weights[known]))

    def _scored(self, store: EmbeddingStore) -> npt.NDArray[np.int64]:
        """Rows of a store that tell how good the classifier is."""
        read = list(self.run_.resolve_features(store).values())
        rows: npt.NDArray[np.int64] = store.rows(split="test", features=read, labelled=True)
        if len(rows):
            return rows
        rows = store.rows(split="val", features=read, labelled=True)
        if not len(rows):
            raise InputError(
                f"{store.path} has no labelled test or val samples, and on those that it was "
                "fitted on a classifier looks better than it is; to score some all the same, give "
                f"their rows: score(store, rows=store.rows(features={read}, labelled=True))"
            )
        warnings.warn(
            f"{store.path} has no labelled test samples: scored on its {len(rows):,} val samples, "
            "on which a training is stopped and thresholds are tuned, so that it flatters",
            UserWarning,
            stacklevel=3,
        )
        return rows

    def save(self, path: str | Path) -> Path:
        """Write the run into a folder: the same as ``mmc train-head`` writes, no pickle.

        Raises:
            InputError: the path is a file, or a folder with other content.
        """
        check_is_fitted(self)
        self.run_.save(path)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """A fitted classifier from what `save` or ``mmc train-head`` wrote.

        Its parameters are what the training came to, so that fitting it again trains alike.

        Raises:
            InputError: not a run.
        """
        run = Run.load(path)
        made = cls(**params_of(run))
        made.run_ = run
        stored = run.source.get("classes")
        made._classes = (
            Classes.from_json(run.task, stored)
            if stored
            else Classes(run.task, np.array(run.label_set))
        )
        made.classes_ = made._classes.values
        if run.from_arrays and [*run.features] == [FIELD]:
            made.n_features_in_ = run.features[FIELD].shape[0]
            if "columns" in run.source:
                made.feature_names_in_ = np.array(run.source["columns"], dtype=object)
        return made

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    def _arrays(
        self, config: TrainConfig, X: Any, y: Any, X_val: Any, y_val: Any
    ) -> tuple[ArrayStore, Classes]:
        """What to train and to validate on."""
        fields = self._fields(X, first=True)
        head = _checked_head(self.head, fields)
        classes, targets = Classes.learn(y, len(fields))
        if (X_val is None) != (y_val is None):
            raise InputError("X_val and y_val go together: give both, or neither")
        if X_val is None:
            share = self._held_out(head, classes.task, len(fields))
            val = np.zeros(len(fields), bool)
            if share is not None:
                val = hold_out(targets, share, config.seed)
        else:
            more = self._fields(X_val, first=False)
            val = np.arange(len(fields) + len(more)) >= len(fields)
            targets = np.concatenate([targets, classes.encode(y_val, len(more), "y_val")])
            fields = fields.joined(more)
        source: dict[str, Any] = {"spec": "arrays", "classes": classes.to_json()}
        if X_val is None:
            source["validation_fraction"] = share
        if hasattr(self, "feature_names_in_"):
            source["columns"] = self.feature_names_in_.tolist()
        store = ArrayStore(
            fields,
            task=classes.task,
            label_set=classes.names,
            targets=targets,
            val=val,
            source=source,
        )
        return store, classes

    def _held_out(self, head: type[Head], task: str, rows: int) -> float | None:
        """Share of the rows that is held out."""
        share = self.validation_fraction
        if isinstance(share, str) and share == "auto":
            wanted = rows >= MANY_ROWS or task == "multilabel" or head.needs_validation
            return 0.1 if wanted else None
        if share is None and head.needs_validation:
            raise InputError(
                f"{self.head} decides by held-out rows what it keeps: give a validation_fraction, "
                "or X_val and y_val"
            )
        if share is not None and not (isinstance(share, Real) and 0 < float(share) < 1):
            raise InputError(
                'validation_fraction must be above 0 and below 1, None or "auto", got '
                f"{share!r}; to choose the rows, give X_val and y_val"
            )
        return None if share is None else float(share)

    def _fields(self, X: Any, *, first: bool) -> Fields:
        """X as fields; sets or checks what scikit-learn knows of columns."""
        X = as_fields(X)
        if isinstance(X, Fields):
            if first:
                self._forget_columns()
            if not len(X):
                raise InputError("X has 0 samples; at least one is needed")
        else:
            array = validate_data(
                self, X, reset=first, dtype=(np.float32, np.float16), ensure_all_finite=False
            )
            X = Fields({FIELD: array})
        X.check_finite()
        return X

    def _forget_columns(self) -> None:
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self, name):
                delattr(self, name)

    def _train(self, store: Any, config: TrainConfig) -> Run:
        """What `mmc.heads.trainer.train` does, without a folder."""
        started = time.perf_counter()
        say: Callable[[str], None] = print if self.verbose else lambda line: None
        setup = Setup(store, config, whole(store))
        for line in setup.notes:
            say(line)
        head, loss = setup.build()
        place = setup.place(head)
        if place.streamed:
            say(memory.describe(place))
        position = setup.fit(head, loss, None, place, lambda stage, done, total: None)
        for line in [*stage_lines(position), *position.notes]:
            say(line)
        run = setup.run(head.state_dict(), position)
        setup.measure(run)
        run.training = effort(setup, position, time.perf_counter() - started)
        return run

    def _predictions(self, X: Any, rows: npt.ArrayLike | None) -> Predictions:
        check_is_fitted(self)
        run: Run = self.run_
        if isinstance(X, EmbeddingStore):
            store: Any = X
        elif rows is not None:
            raise InputError("rows are those of a store; index X instead")
        elif not run.from_arrays:
            raise InputError(
                "the classifier was fitted on a store: give a store, whose features can be compared"
            )
        else:
            X = as_fields(X)
            if isinstance(X, Fields):
                X = fields_of(run, X)
            elif [*run.features] != [FIELD]:
                read = ", ".join(ref.given_name for ref in run.features.values())
                raise InputError(f"X must be a dictionary of arrays, as it was when fitted: {read}")
            store = ArrayStore(self._fields(X, first=False))
        chosen = None if rows is None else np.asarray(rows, np.int64)
        config = PredictConfig(split="all", device=self.device)
        # The head is built, which draws random numbers.
        with torch.random.fork_rng([]):
            found = predict(run, store, chosen, config)
        if not found.ok.all():
            raise RowsNotDoneError(
                f"{int((~found.ok).sum()):,} of {len(found.ok):,} samples have no features; give "
                "the rows that have: store.rows(features=[...])"
            )
        return found


def _checked_head(name: str, fields: Fields) -> type[Head]:
    """The head.

    Raises:
        InputError: it cannot do with such arrays, whatever their content.
    """
    entry = lookup(HEADS, name, kind="head", group=GROUP)
    head: type[Head] = load(entry)
    if head.wants_label_text:
        raise InputError(f"{name} needs label texts, which only a store has: fit it on a store")
    if [*fields] == [FIELD] and (head.needs or head.min_inputs > 1):
        raise InputError(
            f"{name} reads {entry.needs}: give X as a dictionary of arrays by field, such as "
            '{"image": ..., "text": ...}'
        )
    return head
