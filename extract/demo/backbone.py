"""Train a small open_clip model on drawn digits and save it as open_clip's own directory.

Two stages, because towers that start from nothing need very many crowded pictures before they
notice the digits in them. First tiles that one digit fills, and the text tower left as it is:
chasing each other, the two towers had learnt nothing after 200 steps (15 % right digits), with the
text tower at rest 65 %. Then whole pictures, all kinds of captions and both towers.
"""

import json
import math
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc.extract.demo import pictures, words

CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": pictures.SIDE,
        # Convolutions with a global average: tiles and pictures may differ in size.
        "timm_model_name": "test_resnet",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
    },
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}
"""open_clip model configuration: timm's smallest ResNet and a text transformer of two layers."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training with its own kind of picture and its own learning rate schedule."""

    what: str
    """For the report."""
    steps: int
    batch: int
    """Pictures per step."""
    canvas: int
    """Side of the pictures in pixels."""
    most_digits: int
    """Pictures hold one to so many digits."""
    templates: tuple[str, ...]
    """Forms of the captions."""
    image_rate: float
    """Peak learning rate of the image tower."""
    text_rate: float
    """Peak learning rate of the text tower; 0 leaves it as it is, and then the mean of its
    embeddings is subtracted, because an untrained tower gives all texts nearly the same one."""


STAGES = (
    Stage(
        what="single digits",
        steps=500,
        batch=64,
        canvas=32,
        most_digits=1,
        templates=words.LABELS[:1],
        image_rate=3e-3,
        text_rate=0.0,
    ),
    Stage(
        what="whole pictures",
        steps=500,
        batch=64,
        canvas=pictures.SIDE,
        most_digits=pictures.MAX_DIGITS,
        templates=words.LABELS + words.DESCRIPTIONS + words.NOTES,
        image_rate=2e-3,
        text_rate=1e-3,
    ),
)


class _Vocabulary:
    """The tokens that demo captions use, numbered 0 .. n-1 in the tokenizer's own order.

    A dense optimizer step over 49,408 embeddings would cost more than the rest of the text tower,
    and all but some hundred of them never occur. The order is kept because open_clip pools the
    text at the largest token number, which is the end-of-text token.
    """

    def __init__(self, context: int) -> None:
        self._tokenizer = open_clip.SimpleTokenizer(context_length=context)
        special = (0, self._tokenizer.sot_token_id, self._tokenizer.eot_token_id)
        used = self._tokenizer.encode(words.every_caption_word())
        self.ids = torch.tensor(sorted({*special, *used}))

    def __call__(self, texts: list[str]) -> Tensor:
        """Compact token numbers (B, context) int64."""
        return torch.searchsorted(self.ids, self._tokenizer(texts))


def train_backbone(
    directory: Path,
    *,
    seed: int,
    stages: tuple[Stage, ...] = STAGES,
    report: Callable[[str], None] = print,
) -> None:
    """Train with CLIP's contrastive loss on pictures and captions that describe them; save.

    Every picture is drawn anew, and only from the scans of the part "backbone".
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    scans = pictures.load_scans()
    pools = pictures.split_scans(scans, seed)["backbone"]
    model = open_clip.CLIP(**CONFIG)
    model.visual.to(memory_format=torch.channels_last)
    vocabulary = _Vocabulary(CONFIG["text_cfg"]["context_length"])
    whole = model.token_embedding
    model.token_embedding = nn.Embedding(len(vocabulary.ids), whole.embedding_dim)
    with torch.no_grad():
        model.token_embedding.weight.copy_(whole.weight[vocabulary.ids])

    threads = torch.get_num_threads()
    # These layers are too small to share: two threads that wait for each other in every operator
    # were 10 times slower than one as soon as anything else ran. The other core draws.
    torch.set_num_threads(1)
    try:
        half = _bfloat16_is_faster()
        for stage in stages:
            with closing(_batches(stage, scans, pools, vocabulary, rng)) as batches:
                _train_stage(model, stage, batches, half, report)
    finally:
        torch.set_num_threads(threads)
    with torch.no_grad():
        whole.weight[vocabulary.ids] = model.token_embedding.weight
    model.token_embedding = whole
    save(model, directory)


@dataclass(frozen=True)
class _Batch:
    """Digits (B, K) int64, -1 = none; pixels (B, 3, S, S) uint8; tokens (B, T) int64."""

    digits: np.ndarray
    pixels: Tensor
    tokens: Tensor


def _batches(
    stage: Stage,
    scans: pictures.Scans,
    pools: list[np.ndarray],
    vocabulary: _Vocabulary,
    rng: np.random.Generator,
) -> Generator[_Batch, None, None]:
    """Every batch of a stage, drawn by a thread of its own while the one before is used."""

    def drawn() -> _Batch:
        digits = pictures.random_digits(stage.batch, stage.most_digits, rng)
        chosen = pictures.choose_scans(pools, digits, rng)
        pixels = pictures.draw(scans, chosen, rng, stage.canvas)
        texts = [words.caption(row[row >= 0], stage.templates, rng) for row in digits]
        return _Batch(digits, pixels, vocabulary(texts))

    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(drawn)
        for step in range(stage.steps):
            batch = following.result()
            if step + 1 < stage.steps:
                following = pool.submit(drawn)
            yield batch


def _train_stage(
    model: open_clip.CLIP,
    stage: Stage,
    batches: Iterator[_Batch],
    half: bool,
    report: Callable[[str], None],
) -> None:
    """All steps of one stage, reporting five times."""
    optimizer = _optimizer(model, stage)
    model.train()
    started, right = time.perf_counter(), 0.0
    for step, batch in enumerate(batches, 1):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _schedule(step, stage.steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            image = model.encode_image(_normalised(batch.pixels))
            text = model.encode_text(batch.tokens)
        image, text = image.float(), text.float()
        if not stage.text_rate:
            text = text.detach() - text.mean(0).detach()
        loss, found = _contrast(image, text, model.logit_scale, batch.digits)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        right += 0.1 * (found - right) if step > 1 else found
        if step % max(1, stage.steps // 5) == 0:
            report(
                f"  {stage.what}: step {step} of {stage.steps}, loss {loss.item():.3f}, a right "
                f"caption first for {right:.0%}, {time.perf_counter() - started:.0f} s"
            )


def _contrast(
    image: Tensor, text: Tensor, logit_scale: Tensor, digits: np.ndarray
) -> tuple[Tensor, float]:
    """CLIP's symmetric loss where every caption that names just the picture's digits is right.

    Args:
        image, text: (B, D), not normalised.
        digits: (B, K) int64, -1 = none.

    Returns:
        The loss and the share of pictures for which a right caption comes first.
    """
    named = torch.zeros(len(digits), 11).scatter_(1, torch.from_numpy(digits + 1), 1.0)[:, 1:]
    same = (torch.cdist(named, named, p=1) < 0.5).float()
    target = same / same.sum(1, keepdim=True)
    logits = logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, same.gather(1, logits.argmax(1, keepdim=True)).mean().item()


def _normalised(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) as the model takes it: float32, CLIP's mean and deviation."""
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1)
    return ((pixels / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def _optimizer(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """AdamW with each tower's rate; no weight decay on gains, biases and the temperature."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        peak = stage.image_rate if name.startswith("visual.") else stage.text_rate
        decay = 0.05 if parameter.ndim >= 2 else 0.0
        groups.setdefault((peak, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": p, "peak": key[0], "weight_decay": key[1]}
            for key, p in groups.items()
            if key[0]
        ],
        betas=(0.9, 0.98),
    )


def _schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: warm-up over a tenth of the steps, then a cosine."""
    warm = max(1, steps // 10)
    if step <= warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm + 1)))


def _bfloat16_is_faster() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32 (it has units for it or not)."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(768, 768, dtype=dtype)
        best = math.inf
        for _ in range(4):
            started = time.perf_counter()
            matrix @ matrix
            best = min(best, time.perf_counter() - started)
        return best

    return seconds(torch.bfloat16) < seconds(torch.float32)


def save(model: open_clip.CLIP, directory: Path) -> None:
    """Write ``open_clip_config.json`` and ``open_clip_model.safetensors`` as the hub has them."""
    directory.mkdir(parents=True, exist_ok=True)
    preprocess = {
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(weights, directory / "open_clip_model.safetensors")
    text = json.dumps({"model_cfg": CONFIG, "preprocess_cfg": preprocess}, indent=2)
    (directory / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")
