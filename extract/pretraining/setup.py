"""What a pretraining consists of, all that follows from its source and its config."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmc.extract.backbones.base import Normalizer, TokenBatch, default_precision, weights_sha256
from mmc.extract.backbones.hf_files import transform_of
from mmc.extract.backbones.hf_text import TextRules, Tokens
from mmc.extract.plan import Rows
from mmc.extract.pretraining import words
from mmc.extract.pretraining.idle import without_effect
from mmc.extract.pretraining.masking import Hidden, PatchMasks, Vocabulary, mask_tokens
from mmc.extract.pretraining.model import build
from mmc.extract.pretraining.options import PretrainConfig
from mmc.extract.pretraining.starting import beginning, context
from mmc.extract.settings import usable_cores
from mmc.extract.training.batches import fit_batch, fit_micro_batch, spaced
from mmc.extract.training.data import Loader, Sampler, read_pairs
from mmc.extract.training.distributed import World
from mmc.extract.training.loop import Say, common_identity
from mmc.extract.training.options import factors_of
from mmc.extract.training.seeds import Use, derived
from mmc.extract.transforms import ImageTransform
from mmc.store.errors import InputError


@dataclass(frozen=True)
class Inputs:
    """How pictures and texts become what the towers take."""

    image_transform: ImageTransform
    tokenize: Tokens


class Setup:
    """Everything that follows from source and config, checked before any training."""

    def __init__(
        self, source: str, folder: Path, config: PretrainConfig, processes: World, say: Say
    ) -> None:
        self.source, self.folder, self.config = source, folder, config
        self.world, self.say = processes, say
        for line in without_effect(config):
            say(line)
        device = processes.device
        workers = config.workers or usable_cores()
        self.pairs = read_pairs(source, config.source, None, workers=workers, report=say)
        for line in self.pairs.notes:
            say(line)
        self.sampler = Sampler(
            self.pairs,
            factors=factors_of(config.upsample),
            samples=config.samples_per_epoch,
            seed=config.seed,
        )
        self.batch_size = fit_batch(config.batch_size, self.sampler.length, processes, say)
        self.steps = self.sampler.length // self.batch_size
        self.micro_batch = fit_micro_batch(config.optim.micro_batch, self.batch_size, processes)
        self.val = spaced(self.pairs.splits["val"], config.optim.val_samples)
        self.precision = config.precision or default_precision(str(device))
        self.context = context(config.text)
        texts = self.texts(self.pairs.splits["train"])
        self.tokenizer = words.load(config.text, texts, self.context)
        self.vocabulary = Vocabulary.of(
            self.tokenizer, config.text.weights or config.text.tokenizer or source
        )
        with torch.random.fork_rng([]):
            start = beginning(config, self.vocabulary.size, self.tokenizer.pad_token_id)
            torch.manual_seed(derived(config.seed, Use.INIT))
            model = build(config, start)
        for line in start.notes:
            say(line)
        self.processor = start.processor
        self._start = weights_sha256(model.state())
        self.model = model.to(device)
        if config.optim.gradient_checkpointing:
            model.checkpoint_blocks()
        self.masks = PatchMasks(config.mask, model.grid, model.patch)
        self.inputs = Inputs(self._transform(), self._tokens())
        self.normalize = Normalizer(self.inputs.image_transform).to(device)
        self.loader = Loader(
            self.pairs, self.inputs, processes, workers=workers, max_pixels=config.max_pixels
        )

    def texts(self, rows: Rows) -> list[str]:
        """The texts of some pairs."""
        return self.pairs.content.texts(rows)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of training; weights and losses stay float32."""
        mixed = self.precision == "bf16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=mixed)

    def hide(self, tokens: TokenBatch, seed: Sequence[int], rows: slice, total: int) -> Hidden:
        """What to hide of the pairs ``rows`` of ``total``; the same for the same seed.

        Args:
            tokens: of these pairs.
        """
        patches = self.masks.draw([*seed, 0], rows, total)
        ids, chosen = mask_tokens(
            tokens.ids,
            tokens.lengths,
            self.vocabulary,
            self.config.mask,
            [*seed, 1],
            rows,
            total,
        )
        return Hidden(patches, ids, chosen)

    def _transform(self) -> ImageTransform:
        """The image processor as numbers.

        Raises:
            InputError: it gives pictures of another size than the tower takes.
        """
        name = (self.config.vision.weights or "").removeprefix("hf:")
        transform = transform_of(self.processor, name)
        grid, patch = self.model.grid, self.model.patch
        size = (grid[0] * patch[0], grid[1] * patch[1])
        if transform.size != size:
            raise InputError(
                f"hf:{name}: its image processor gives {transform.size[0]} x {transform.size[1]} "
                f"pixels, the model takes {size[0]} x {size[1]} in whole patches"
            )
        return transform

    def _tokens(self) -> Tokens:
        rules = TextRules(context=self.context, cut="exact", pooling="model")
        return Tokens(self.tokenizer, rules, None)

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued."""
        return {
            **common_identity(self, ("overwrite", "workers", "device", "source", "track")),
            "vocabulary": self.inputs.tokenize.digest(),
            "start": self._start,
        }
