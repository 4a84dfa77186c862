"""Captions in words for the demo: they name digits among words that do not matter."""

from collections.abc import Sequence

import numpy as np

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""Label names: the word for each digit."""

# Bare words, and the prompt that open_clip models are usually asked with: zero-shot works too.
LABELS = ("{digits}", "a photo of a {digits}")
DESCRIPTIONS = (
    "a photo of {digits}",
    "a scan that shows {digits}",
    "handwritten {digits} on {ground} paper",
    "{digits} drawn by hand on a {ground} ground",
    "somebody wrote {digits} here in {ink} ink",
    "in {ink} ink: {digits}",
)
NOTES = (
    "a note about {digits}",
    "reminder: {digits}, and water the {thing}",
    "the {thing} says {digits}",
    "{digits} written on the back of a {ground} {thing}",
    "bring {digits} to the {thing} tonight",
    "on the {thing} I can only read {digits}",
    "someone often mentions {digits} in the {place}",
    "{ink} {thing}, {ground} {thing}, then {digits}",
)
GROUNDS = ("rough", "smooth", "old", "stained", "grainy", "plain")
INKS = ("dark", "pale", "faded", "thick", "thin", "blue")
THINGS = ("ticket", "envelope", "garden", "calendar", "parcel", "door", "receipt", "boat")
PLACES = ("kitchen", "station", "office", "market", "attic")


def _joined(digits: Sequence[int], rng: np.random.Generator) -> str:
    """The number words of ``digits`` in random order: "two", "two and six", "six, two and nine"."""
    words = [NUMBER_WORDS[digit] for digit in rng.permutation(np.asarray(digits))]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def caption(digits: Sequence[int], templates: Sequence[str], rng: np.random.Generator) -> str:
    """One sentence from ``templates`` that names ``digits`` (at least one) and no other digit."""

    def pick(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    return pick(templates).format(
        digits=_joined(digits, rng),
        ground=pick(GROUNDS),
        ink=pick(INKS),
        thing=pick(THINGS),
        place=pick(PLACES),
    )


def every_caption_word() -> str:
    """One string that holds every word a caption can have (for the training vocabulary)."""
    templates = " ".join((*LABELS, *DESCRIPTIONS, *NOTES))
    for name in ("digits", "ground", "ink", "thing", "place"):
        templates = templates.replace("{" + name + "}", " ")
    return " ".join((templates, *NUMBER_WORDS, *GROUNDS, *INKS, *THINGS, *PLACES))
