"""The page of a run: figures against scikit-learn, markup that holds, hostile names, a browser."""

import csv
import html
import itertools
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from sklearn import metrics as reference

from mmc.heads.bootstrap import drawn, resampled
from mmc.heads.labels.analysis import analyse_labels
from mmc.heads.labels.brief import Brief
from mmc.heads.labels.options import LabelsConfig
from mmc.heads.labels.suspects import WORTH_A_LOOK
from mmc.heads.metrics import evaluate
from mmc.heads.report import samples
from mmc.heads.report.charts import _ticks
from mmc.heads.report.figures import precision_recall
from mmc.heads.report.measured import (
    Measured,
    counted,
    intervals,
    measure,
    reliability,
)
from mmc.heads.report.mixups import mistakes, mix_ups
from mmc.heads.report.origin import changed, commands
from mmc.heads.report.page import trained_store, write_report
from mmc.store.errors import InputError, MmcError

EVIL = '<script>alert("x")</script>'
VOID = {"meta", "link", "br", "img", "path", "polyline", "circle"}


def answers(task: str, *, n: int = 60, c: int = 4, seed: int = 0) -> Measured:
    """Random logits and truth; decisions at 0.5, or the largest."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, c, generator=draw)
    if task == "multilabel":
        truth = (torch.rand(n, c, generator=draw) < 0.4).to(torch.int8)
        p = logits.sigmoid()
        decisions = p >= 0.5
    else:
        truth = torch.eye(c, dtype=torch.int8)[torch.randint(c, (n,), generator=draw)]
        p = logits.softmax(1)
        decisions = torch.zeros(n, c, dtype=torch.bool).scatter_(1, p.argmax(1)[:, None], True)
    return Measured(
        split="test",
        rows=np.arange(n),
        logits=logits,
        probabilities=p,
        decisions=decisions,
        truth=truth,
        metrics={},
    )


def picture(row: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (12, 8), (row % 255, 90, 30)).save(file, "JPEG")
    return file.getvalue()


class Page(HTMLParser):
    """Checks that tags nest, and gathers what other checks ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("task", ["multilabel", "binary", "multiclass"])
def test_resampled_figures_are_those_of_scikit_learn(task: str):
    measured = answers(task, c=2 if task == "binary" else 4)
    counts = np.concatenate(list(drawn(60, 5, 3)))
    found = counted(measured, task, counts)
    chosen, truth = measured.decisions.numpy(), measured.truth.numpy()
    if task != "multilabel":
        chosen, truth = chosen.argmax(1), truth.argmax(1)

    def f1(average: str, **more: Any) -> list[float]:
        return [
            reference.f1_score(
                truth, chosen, average=average, sample_weight=w, zero_division=0, **more
            )
            for w in counts
        ]

    expected = {"macro_f1": f1("macro")}
    if task == "multilabel":
        expected |= {"micro_f1": f1("micro"), "samples_f1": f1("samples")}
    same = [reference.accuracy_score(truth, chosen, sample_weight=w) for w in counts]
    expected["subset_accuracy" if task == "multilabel" else "accuracy"] = same
    if task != "multilabel":
        expected["balanced_accuracy"] = [
            reference.balanced_accuracy_score(truth, chosen, sample_weight=w) for w in counts
        ]
    if task == "binary":
        expected["f1"] = f1("binary")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-12, err_msg=name)


def test_resampled_average_precision_is_that_of_scikit_learn():
    measured = answers("binary", c=2)
    truth = measured.truth[:, 1]
    values = resampled(measured.logits, truth, "binary", metric="ap", seed=1, resamples=4)
    margin = (measured.logits[:, 1].double() - measured.logits[:, 0].double()).numpy()
    for value, weights in zip(values, np.concatenate(list(drawn(60, 4, 1))), strict=True):
        expected = reference.average_precision_score(truth, margin, sample_weight=weights)
        assert value == pytest.approx(expected)


def test_intervals_hold_the_figures_and_repeat():
    measured = answers("multilabel", n=200)
    found = intervals(measured, "multilabel", seed=4)
    assert found == intervals(measured, "multilabel", seed=4)
    assert found != intervals(measured, "multilabel", seed=5)
    value = reference.average_precision_score(measured.truth.numpy(), measured.logits.numpy())
    low, high = found["mAP"]
    assert low < value < high
    assert 0.02 < high - low < 0.2


def test_an_interval_that_does_not_hold_its_figure_is_not_given():
    truth = torch.eye(50, dtype=torch.int8).repeat(1, 12)
    one_each = replace(answers("multilabel", n=50, c=600), truth=truth)
    names = [str(label) for label in range(600)]
    value = evaluate(one_each.logits, one_each.truth, "multilabel", label_set=names)["mAP"]
    bare = intervals(one_each, "multilabel")["mAP"]
    assert value < bare[0], "copies of the only sample of a label rank it too well"
    found = intervals(replace(one_each, metrics={"mAP": value}), "multilabel")["mAP"]
    assert np.isnan(found).all()


def test_curves_are_those_of_scikit_learn():
    draw = np.random.default_rng(0)
    scores, truth = draw.integers(0, 30, 200).astype(float), draw.random(200) < 0.3
    precision, recall, _ = reference.precision_recall_curve(truth, scores)
    expected = [(r, p) for p, r in zip(precision[:-1], recall[:-1], strict=True)][::-1]
    np.testing.assert_allclose(precision_recall(scores, truth, 1000), expected)
    few = precision_recall(scores, truth, 8)
    assert len(few) <= 10
    assert set(few) <= set(precision_recall(scores, truth, 1000))
    assert few[-1][0] == 1


@pytest.mark.parametrize("task", ["multilabel", "binary", "multiclass"])
def test_bins_of_probabilities(task: str):
    measured = answers(task, c=2 if task == "binary" else 4, n=300)
    p, yes = measured.probabilities.numpy(), measured.truth.numpy() == 1
    if task == "binary":
        p, yes = p[:, 1], yes[:, 1]
    elif task == "multiclass":
        p, yes = p.max(1), yes[np.arange(300), p.argmax(1)]
    expected = [
        (inside.sum(), p[inside].mean(), yes[inside].mean())
        for k in range(15)
        for inside in [(p >= k / 15) & (p < (k + 1) / 15)]
        if inside.any()
    ]
    np.testing.assert_allclose(reliability(measured, task, 1.0), expected, rtol=1e-5)


def test_mix_ups_count_samples_that_lack_the_label():
    truth = torch.tensor([[1, 0], [1, 0], [1, 1], [0, 1]], dtype=torch.int8)
    chosen = torch.tensor([[1, 1], [0, 0], [1, 1], [0, 0]], dtype=torch.bool)
    base = answers("multilabel", n=4, c=2)
    measured = Measured(**{**vars(base), "truth": truth, "decisions": chosen})  # type: ignore[arg-type]
    shares = mix_ups(measured, [0, 1])
    # Two have the first and lack the second: one was given it. Of three with the first, two found.
    np.testing.assert_allclose(shares, [[2 / 3, 1 / 2], [0, 1 / 2]])
    np.testing.assert_allclose(mix_ups(measured, [1]), [[1 / 2]])
    assert mistakes(measured).tolist() == [1, 1]


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_the_labels_with_the_most_mistakes_are_found_without_their_table(task, monkeypatch):
    monkeypatch.setattr("mmc.heads.report.mixups.BLOCK_ENTRIES", 100)
    measured = answers(task, n=150, c=9)
    yes, wrong = measured.truth == 1, measured.decisions & (measured.truth == 0)
    table = yes.double().T @ wrong.double()
    assert torch.equal(mistakes(measured), table.sum(0) + table.sum(1))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.93, 0.951), (0.5, 48.5), (-3, 1e6)])
def test_ticks_are_round_and_inside(low: float, high: float):
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert low <= ticks[0] < ticks[-1] <= high
    assert all(len(f"{tick:g}") <= 7 for tick in ticks)


@pytest.mark.parametrize("task", ["multilabel", "binary", "multiclass"])
def test_a_page_is_whole_and_needs_nothing(task: str, make_store, make_run, tmp_path: Path):
    store = make_store(task, n=120)
    run = make_run(store, temperature=0.8).save(tmp_path / "my.run")
    done = write_report(run, store, tmp_path / "r.html", thumbnail=picture, device="cpu")
    text = done.path.read_text(encoding="utf-8")
    page = Page(text)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert Counter(ids).most_common(1)[0][1] == 1
    links = [a["href"] for a in page.of("a")]
    assert {link[1:] for link in links} <= set(ids)
    assert {"#quality", "#labels", "#confusions", "#calibration", "#samples"} <= set(links)
    assert all(image["alt"] for image in page.of("img"))
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.of("img"))
    assert all(head["scope"] in ("col", "row") for head in page.of("th"))
    assert all(a.get("aria-label") or a.get("aria-hidden") for a in page.of("svg"))
    assert len(page.of("h1")) == len(page.of("title")) == len(page.of("main")) == 1
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text)
    assert done.samples == 27  # of 30 two failed and one has no labels
    assert done.interval[0] <= done.value <= done.interval[1]
    assert f"{done.value:.3f}" in text


def test_names_and_texts_stay_text(make_store, make_run, tmp_path: Path):
    names = (EVIL, "a&b", '" onload="x', "ok", "\x00null")
    store = make_store(label_set=names, source={"spec": f"{EVIL}.csv"})
    run = make_run(store, recipe_text=EVIL)
    write_report(run, store, tmp_path / "r.html", thumbnail=picture, device="cpu")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.of("script")) == 1
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in text
    assert "\x00" not in text
    assert not [attributes for _, attributes in page.tags if "onload" in attributes]


def test_a_picture_that_is_gone_is_said(make_store, make_run, tmp_path: Path):
    def gone(row: int) -> bytes:
        raise MmcError("no such file")

    store = make_store()
    write_report(make_run(store), store, tmp_path / "r.html", thumbnail=gone, device="cpu")
    assert "no picture: no such file" in (tmp_path / "r.html").read_text()


def test_thousands_of_labels_make_a_page_of_bounded_size(make_store, make_run, tmp_path: Path):
    names = tuple(f"label number {i}" for i in range(1200))
    store = make_store(label_set=names[:5], n=400)
    measured = answers("multilabel", n=400, c=1200)
    run = make_run(store)
    run.label_set = names
    from mmc.heads import metrics
    from mmc.heads.report import figures, mixups

    found = metrics.evaluate(measured.logits, measured.truth, "multilabel", label_set=names)
    measured.metrics.update(found)
    parts = [figures.labels(run, measured), mixups.confusions(run, measured)]
    near = [
        {"label": a, "view": "text", "rank": 1, "nearest": b, "value": 0.5, "disagree": 0}
        for a, b in itertools.pairwise(names)
    ]
    parts.append(mixups.near_labels(run, measured, near))
    assert "200 labels between the best and the last are left out" in parts[0]
    assert sum(map(len, parts)) < 1_000_000


@pytest.mark.parametrize("task", ["multilabel", "binary", "multiclass"])
def test_suspects_and_nearest_labels_are_those_of_mmc_labels(
    task: str, make_store, make_run, tmp_path: Path
):
    store = make_store(task, n=200, noise=0.8)
    run = make_run(store).save(tmp_path / "run")
    analyse_labels(store, tmp_path / "labels", LabelsConfig(device="cpu"), run=run)
    write_report(run, store, tmp_path / "r.html", device="cpu")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")

    def table(name: str) -> list[dict[str, str]]:
        with (tmp_path / "labels" / name).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    part = text.split('id="suspects"')[1].split("</section>")[0]
    cards = re.findall(r"<b>(s\d+)</b>.*?>score:</span> ([\d.]+)</p>", part)
    expected = [
        (row["id"], float(row["score"]))
        for kind in ("missing", "extra", "wrong")
        for row in table("suspects.csv")
        if row["kind"] == kind and int(row["rank"]) <= samples.SHOWN
        if float(row["score"]) >= WORTH_A_LOOK
    ]
    assert expected
    assert [name for name, _ in cards] == [name for name, _ in expected]
    np.testing.assert_allclose([float(v) for _, v in cards], [v for _, v in expected], atol=0.006)
    near = [row for row in table("nearest_labels.csv") if int(row["rank"]) <= 3]
    assert near
    found = html.unescape(text.split('id="near"')[1].split("</section>")[0])
    assert all(f"{row['nearest']} {float(row['value']):.2f}" in found for row in near)


def test_suspects_that_are_not_worth_a_look_are_not_shown(make_store):
    store = make_store()
    row = {
        "kind": "extra",
        "label": "bus",
        "suggested": None,
        "probability": 0.4,
        "evidence": "leave-one-out",
        "neighbors": None,
        "run": None,
        "labels": ["bus"],
        "split": "test",
        "_row": 5,
    }

    def shown(*scores: float) -> str:
        doubted = [{**row, "score": score} for score in scores]
        found = Brief(suspects=doubted, nearest=[], left_out="2 samples are left out")
        return samples.suspects(found, samples.album(store, None))

    assert shown(0.3, 0.1, 0.02).count("remove bus?") == 2
    assert "Warning: 2 samples are left out." in shown(0.3)
    none = shown(0.03, 0.02)
    assert "remove bus?" not in none
    assert "None is worth a look" in none
    assert "a score of 0.03" in none
    assert "Warning: 2 samples are left out." in none


def test_a_run_that_nothing_can_be_compared_by_is_reported(
    make_store, make_run, monkeypatch, tmp_path
):
    store = make_store()

    def refuse(*_: Any, **__: Any) -> None:
        raise InputError("no pooled feature here")

    monkeypatch.setattr("mmc.heads.labels.brief.Material", refuse)
    write_report(make_run(store), store, tmp_path / "r.html", device="cpu")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "no pooled feature here" in text.split('id="suspects"')[1].split("</section>")[0]
    assert 'id="near"' not in text


def test_commands_say_what_differs_from_the_defaults(make_store, make_run, tmp_path: Path):
    store = make_store(source={"options": {"label_column": "my tags"}})
    run = make_run(
        store,
        history=[{"stage": "train", "epoch": 1}],
        train_config={
            "batch_size": 64,
            "epochs": None,
            "lr": 0.01,
            "settings": {"optim": {"patience": 3, "ema": 0.0}},
        },
    )
    assert changed(run) == {"head.normalize": "none", "optim.patience": "3"}
    lines = commands(run, "my.store", "test").splitlines()
    assert lines[0] == (
        "mmc extract store.csv my.store --backbone open_clip:tiny --name clip --fields image "
        "--label-column 'my tags'"
    )
    assert lines[1] == (
        "mmc train-head my.store RUN --head linear --features image=clip/image --loss bce "
        "--batch-size 64 --lr 0.01 --seed 0 --set head.normalize=none --set optim.patience=3"
    )


def test_what_cannot_be_reported_is_said(make_store, make_run, tmp_path: Path):
    store = make_store()
    run = make_run(store)
    with pytest.raises(InputError, match="does not record its store; name it with --store"):
        trained_store(run, "my.run")
    run.training = {"store": str(tmp_path / "moved")}
    with pytest.raises(InputError, match="moved, which is not there any more"):
        trained_store(run, "my.run")
    with pytest.raises(InputError, match="no samples in split 'tset'"):
        write_report(run, store, tmp_path / "r.html", split="tset", device="cpu")
    with pytest.raises(InputError, match="is a folder"):
        write_report(run, store, tmp_path, device="cpu")
    other = make_store("multiclass", name="other")
    with pytest.raises(InputError, match="is multiclass and the run multilabel"):
        write_report(run, other, tmp_path / "r.html", device="cpu")
    assert not (tmp_path / "r.html").exists()


def test_changed_samples_and_optimistic_figures_are_told(make_store, make_run, tmp_path: Path):
    store = make_store()
    rows = store.rows(split="test", labelled=True)
    digest = measure(make_run(store), store, rows[store["clip/image"].done[rows]], "test", "cpu")
    recorded = {"rows_digest": digest.metrics["rows_digest"], "also_in_train": {"text": 4}}
    run = make_run(store, metrics={"test": recorded})

    def notes(**options: Any) -> list[str]:
        write_report(run, store, tmp_path / "r.html", device="cpu", **options)
        text = (tmp_path / "r.html").read_text()
        return re.findall(r'class="note">(.*?)</p>', text)

    assert notes() == [
        "Of these samples 4 have the text of a training sample: on new ones the run may do worse "
        "than the figures say."
    ]
    recorded["rows_digest"] = "of other labels"
    assert "have changed since the training" in notes()[0]
    assert "flatter" in notes(split="train")[0]
    assert "the figures are optimistic" in notes(split="val")[0]


def test_a_metric_that_is_not_defined_is_left_out(make_store, make_run, tmp_path: Path):
    store = make_store("binary", label_set=("0", "1"))
    only = [i for i in range(60) if 0 not in store.labels.multi_hot()[i][1:]]
    table = store.samples.drop_columns(["_gone", "_source"])
    split = ["test" if i in only else "val" for i in range(60)]
    table = table.set_column(table.column_names.index("split"), "split", pa.array(split))
    store.sync(table, label_set=("0", "1"), task="binary", source={"spec": "store.csv"})
    done = write_report(make_run(store), store, tmp_path / "r.html", device="cpu")
    assert (done.value, done.interval) == (None, None)
    assert "auroc – on" in str(done)
    text = (tmp_path / "r.html").read_text()
    assert "<dt>AUROC</dt>" not in text.split("</dl>")[0]
    assert "its AUROC is not defined." in text


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr"]
    return subprocess.run(
        [*command, *options, page.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )


def test_a_browser_shows_the_page_and_sorts(make_store, make_run, tmp_path: Path):
    store = make_store(n=120)
    write_report(make_run(store), store, tmp_path / "r.html", thumbnail=picture, device="cpu")
    shown = browse(tmp_path / "r.html", "--screenshot=" + str(tmp_path / "shot.png"))
    assert "CONSOLE" not in shown.stderr, shown.stderr
    colours = Image.open(tmp_path / "shot.png").convert("RGB").getcolors(1 << 20)
    assert colours is not None
    assert len(colours) > 20
    # The page lets no other script run, so the click is in a copy without that rule.
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy".*?>', text)
    assert policy is not None
    click = """<script>
      const buttons = document.querySelectorAll("#labels th button");
      buttons[1].click(); buttons[1].click();
      location.hash = document.querySelector("#labels tbody a").hash;
    </script>"""
    copy = tmp_path / "copy.html"
    copy.write_text(text.replace(policy[0], "") + click, encoding="utf-8")
    done = browse(copy, "--virtual-time-budget=2000", "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    table = done.stdout.split('id="labels"')[1].split("</table>")[0]
    heads = re.findall(r'aria-sort="(\w+)"', table)
    assert heads[:3] == ["none", "ascending", "none"]
    body = table.split("<tbody>")[1]
    supports = [int(row.split('data-v="')[1].split('"')[0]) for row in body.split("<tr>")[1:]]
    assert supports == sorted(supports)
    assert re.search(r"<details[^>]* open", done.stdout.split('id="labels"')[1])
    # The rule itself stops a script that data smuggled in.
    copy.write_text(text.replace("</main>", "<script>console.log('ran')</script></main>"))
    stopped = browse(copy, "--dump-dom")
    assert "Content Security Policy" in stopped.stderr
    assert '"ran"' not in stopped.stderr


def test_weights_of_fields_are_shown_for_the_heads_that_have_them(
    make_store: Callable, tmp_path: Path
):
    from mmc.heads.options import TrainConfig
    from mmc.heads.trainer import train

    store = make_store(n=120)
    for head in ("router", "ensemble"):
        config = TrainConfig(head=head, epochs=2, device="cpu", precision="float32")
        run = train(store, tmp_path / head, config).run
        assert trained_store(run, head) == str(Path(store.path).absolute())
        write_report(run, store, tmp_path / "r.html", device="cpu")
        text = (tmp_path / "r.html").read_text()
        part = text.split('id="fields"')[1].split("</section>")[0]
        assert "clip/image" in part
        shares = [float(v) for v in re.findall(r'data-v="([\d.]+)"', part)]
        np.testing.assert_allclose(np.reshape(shares, (-1, 2)).sum(1), 1, atol=1e-4)
        assert 'class="chart"' in text.split('id="learning"')[1]
