"""The tokenizer of a text tower: a pretrained one, or WordPiece made from the user's own texts."""

from collections.abc import Iterable
from typing import Any

from mmc.extract.backbones import parse_spec
from mmc.extract.backbones.hf_files import Files, load_tokenizer
from mmc.extract.pretraining.options import TextConfig
from mmc.store.errors import InputError

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
"""BERT's special tokens; their ids are 0 to 4."""
_VOCABULARY = 30_000
_LEAST = 2
"""A piece must occur so often to become a token."""


def load(config: TextConfig, texts: Iterable[str], tokens: int) -> Any:
    """The tokenizer that a config asks for, of transformers.

    Args:
        config: of the tower.
        texts: what a vocabulary is made from, where one is made.
        tokens: where it cuts.

    Raises:
        InputError: it cannot be loaded, or is not that of the tower's weights.
    """
    if config.weights is None and config.tokenizer is None:
        found = make(texts, config.vocabulary or _VOCABULARY, lower=config.lower)
    else:
        found = load_tokenizer(Files(parse_spec(config.weights or config.tokenizer or "").name))
    if config.weights is not None and config.tokenizer is not None:
        other = load_tokenizer(Files(parse_spec(config.tokenizer).name))
        if other.get_vocab() != found.get_vocab():
            raise InputError(
                f"the vocabulary of {config.tokenizer} ({len(other):,} tokens) is not that of "
                f"{config.weights} ({len(found):,} tokens); leave out the tokenizer"
            )
    found.model_max_length = tokens
    return found


def make(texts: Iterable[str], size: int, *, lower: bool) -> Any:
    """A WordPiece tokenizer as BERT's (Schuster and Nakajima 2012), of at most ``size`` tokens.

    The same texts give the same ids: the trainer numbers letters inside words in no fixed order,
    and ties among pieces go by these numbers, so the letters are given to it in theirs.
    """
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from tokenizers.trainers import WordPieceTrainer
    from transformers import PreTrainedTokenizerFast

    given, special = list(texts), list(SPECIAL.values())
    normalizer = normalizers.BertNormalizer(lowercase=lower)
    splitter = pre_tokenizers.BertPreTokenizer()

    def tokenizer_of(model: WordPiece) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
        return tokenizer

    letters = sorted({letter for text in given for letter in normalizer.normalize_str(text)})
    trained = tokenizer_of(WordPiece(unk_token=SPECIAL["unk_token"]))
    trainer = WordPieceTrainer(
        vocab_size=size,
        min_frequency=_LEAST,
        special_tokens=special + [f"##{letter}" for letter in letters if not letter.isspace()],
        show_progress=False,
    )
    trained.train_from_iterator(given, trainer)
    # Anew, so that the letters are no special tokens.
    tokenizer = tokenizer_of(WordPiece(trained.get_vocab(), unk_token=SPECIAL["unk_token"]))
    tokenizer.decoder = decoders.WordPiece()
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
