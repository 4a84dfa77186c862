"""ONNX files: every head of the table, run by onnxruntime alone, gives what the run gives."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from mmc.heads import export
from mmc.heads.artifact import Run
from mmc.heads.export import default_path, export_onnx
from mmc.heads.featureref import FeatureRef
from mmc.heads.models import GROUP, HEADS
from mmc.heads.models.base import Head
from mmc.heads.models.vilbert_trunk import SMALL
from mmc.heads.needs import MASKED, mask_of
from mmc.heads.thresholds import Thresholds
from mmc.store.errors import InputError, MmcError
from mmc.store.registry import entries
from mmc.store.registry import load as load_entry

LABELS = ("a", "b", "c, d", "é")
FIELDS: dict[str, tuple[int, ...]] = {
    "image": (12,),
    "text": (8,),
    "image_tokens": (6, 12),
    "image_class": (12,),
    "image_places": (6, 3),
    "text_tokens": (5, 8),
    "text_ids": (5,),
    "fused_tokens": (5, 8),
    "regions": (4, 12),
    "boxes": (4, 5),
}
DTYPES = {"image_places": "int16", "text_ids": "int32"}
SMALLER: dict[str, dict[str, Any]] = {
    "ml_decoder": {"width": 16, "feedforward": 24, "groups": 3},
    "fusion": {"width": 16, "feedforward": 24},
}
TINY = replace(SMALL, vocabulary=50, text_layers=2, region_layers=1, text_width=48)
NAMES = [entry.name for entry in entries(HEADS, GROUP)]


def ref(field: str, dtype: str | None = None) -> FeatureRef:
    shape = FIELDS.get(field) or next(FIELDS[f][:1] for f in MASKED if mask_of(f) == field)
    dtype = dtype or ("bool" if field.endswith("_mask") else DTYPES.get(field, "float16"))
    return FeatureRef(
        feature=f"clip/{field}",
        alias="clip",
        field=field,
        fingerprint="f" * 8,
        identity={},
        context={"spec": "tiny:model"},
        shape=shape,
        dtype=dtype,
    )


def make_run(
    name: str,
    fields: list[str] | None = None,
    *,
    task: str = "multilabel",
    roles: dict[str, str] | None = None,
    **settings: Any,
) -> Run:
    """A run of random weights on the fields that its head needs, a mask with each that has one."""
    torch.manual_seed(0)
    cls: type[Head] = load_entry(next(e for e in entries(HEADS, GROUP) if e.name == name))
    if fields is None:
        fields = ["image", "text"][: cls.max_inputs or 2]
        if cls.needs:
            fields = [need.fields[0] for need in cls.needs] + list(cls.extras)
        fields += [mask_of(f) for f in fields if f in MASKED]
    refs = {role: ref(field) for role, field in (roles or {f: f for f in fields}).items()}
    labels = LABELS[:2] if task == "binary" else LABELS
    wants = cls.wants_label_text or cls.takes_label_text
    config = cls.Config(**{**SMALLER.get(name, {}), **settings})
    head = cls(
        {role: r.shape for role, r in refs.items()},
        len(labels),
        config,
        label_text=torch.randn(len(labels), 12) if wants else None,
    )
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    rows = torch.tensor([0, 1, 0, 1, 0, 1, 0])
    head.fit_labels(torch.tensor([0, 2, 4, 6, 7]), rows)
    return Run(
        head=name,
        head_config=asdict(config),
        loss="bce",
        loss_config={},
        features=refs,
        label_set=labels,
        task=task,
        state=head.state_dict(),
        thresholds=Thresholds.default(task, len(labels)),
        temperature=1.7,
    )


def rows_of(run: Run, n: int, seed: int) -> dict[str, Tensor]:
    """Rows as a store gives them."""
    random = np.random.default_rng(seed)
    batch = {}
    for role, r in run.features.items():
        shape = (n, *r.shape)
        if r.dtype == "bool":
            values = random.random(shape) < 0.5
        elif r.dtype.startswith("int"):
            values = random.integers(0, 30, shape)
        else:
            values = random.normal(1, 1, shape)
        batch[role] = torch.from_numpy(values.astype(r.dtype))
    return batch


def assert_same(run: Run, path: Path) -> None:
    """The file, run by onnxruntime, agrees with the head for odd batches and a single row."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    head = run.build_head()
    assert [value.name for value in session.get_inputs()] == list(run.features)
    assert [value.name for value in session.get_outputs()] == ["logits", "probabilities"]
    for value in (*session.get_inputs(), *session.get_outputs()):
        assert value.shape[0] == "batch"
    for n in (1, 5, 18):
        batch = {
            role: values.float() if values.is_floating_point() else values
            for role, values in rows_of(run, n, seed=n).items()
        }
        with torch.no_grad():
            wanted = head(batch)
        given = {role: values.numpy() for role, values in batch.items()}
        logits, p = (torch.from_numpy(x) for x in session.run(None, given))
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
        scaled = wanted.double() / run.temperature
        expected = scaled.sigmoid() if run.task == "multilabel" else scaled.softmax(1)
        torch.testing.assert_close(p, expected.float(), rtol=1e-4, atol=1e-5)
        assert n == 1 or logits.std(0).min() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_every_head_can_be_exported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmc.heads.models.vilbert.SMALL", TINY)
    run = make_run(name)
    report = export_onnx(run, tmp_path / "head.onnx")
    assert_same(run, tmp_path / "head.onnx")
    assert 0 <= max(report.max_difference.values()) < 1e-3
    assert report.bytes == (tmp_path / "head.onnx").stat().st_size
    assert set(report.inputs) == set(run.features)


@pytest.mark.parametrize(
    ("name", "fields", "settings"),
    [
        ("ml_decoder", ["regions", "region_mask"], {"queries": "label_text"}),
        ("fusion", ["regions", "region_mask", "boxes", "text_tokens", "text_mask"], {}),
    ],
)
def test_masks_and_label_texts(
    name: str, fields: list[str], settings: dict[str, Any], tmp_path: Path
) -> None:
    run = make_run(name, fields, **settings)
    export_onnx(run, tmp_path / "head.onnx")
    assert_same(run, tmp_path / "head.onnx")


def test_boost_takes_its_base_with_it(tmp_path: Path) -> None:
    base = make_run("mlp", ["image"], hidden=8)
    record = {
        "head": "mlp",
        "config": base.head_config,
        "roles": {"image": "image"},
        "weights_sha256": "",
    }
    run = make_run("boost", base="x", base_run=record, hidden=8, rounds=1)
    export_onnx(run, tmp_path / "head.onnx")
    assert_same(run, tmp_path / "head.onnx")


def test_classes_roles_with_dots_and_what_else_is_needed(tmp_path: Path) -> None:
    run = make_run("linear", task="binary", roles={"left.image": "image", "right.image": "image"})
    run.thresholds = Thresholds(values=(0.3,), mode="global")
    export_onnx(run, tmp_path / "head.onnx")
    assert_same(run, tmp_path / "head.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "head.onnx")
    found = json.loads(session.get_modelmeta().custom_metadata_map["mmc"])
    assert found["label_set"] == list(LABELS[:2])
    assert found["thresholds"] == [0.3]
    assert (found["task"], found["head"], found["temperature"]) == ("binary", "linear", 1.7)
    assert found["inputs"]["left.image"] == {
        "feature": "clip/image",
        "fingerprint": "f" * 8,
        "dtype": "float32",
        "shape": [12],
        "spec": "tiny:model",
    }


def test_an_older_run_has_its_types_by_name() -> None:
    run = make_run("fusion")
    run.features = {role: replace(r, dtype="") for role, r in run.features.items()}
    found = {role: export._taken(run, role)["dtype"] for role in run.features}
    assert found["image_places"] == "int16"
    assert found["fused_mask"] == "bool"
    assert found["image_tokens"] == found["boxes"] == "float32"


class Stubborn(Head):
    """Does what no graph can hold."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = batch["image"]
        return x[:, :4] * (1 if float(x.sum()) > 0 else 2)


class Wrong(Head):
    """Another answer to the exporter than in use."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["image"][:, :4] * (1.01 if torch.compiler.is_exporting() else 1.0)


@pytest.mark.parametrize(
    ("head", "said"),
    [(Stubborn, "linear cannot be exported to ONNX: "), (Wrong, "gives other logits than torch")],
)
def test_a_head_that_cannot_says_so_and_leaves_no_file(
    head: type[Head], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("linear", ["image"])
    built = head({"image": (12,)}, 4, None)
    monkeypatch.setattr(Run, "build_head", lambda self: built)
    with pytest.raises(MmcError, match=said) as caught:
        export_onnx(run, tmp_path / "head.onnx")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else real(name)
    )
    with pytest.raises(MmcError, match=r"needs onnxscript: .*pip install 'mmc\[onnx\]'"):
        export_onnx(make_run("linear"), tmp_path / "head.onnx")


@pytest.mark.parametrize("out", [".", "nowhere/head.onnx"])
def test_a_place_that_is_none_is_refused_before_any_work(out: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--out"):
        export_onnx(make_run("linear"), tmp_path / out)


def test_it_goes_beside_the_run(tmp_path: Path) -> None:
    assert default_path(tmp_path / "my.run").name == "my.onnx"
    assert default_path(tmp_path / "runs" / "v1.2") == tmp_path / "runs" / "v1.2.onnx"
