"""Sources: where samples come from. One format per file; this table is the menu.

A format is a class with ``recognises(spec)`` and ``read(spec, options)`` (see ``base.Format``).
Formats are asked in this order. Other packages add theirs under entry point ``mmc.sources``.
"""

from mmc.extract.sources.base import Format, Records, Samples, SourceOptions
from mmc.extract.sources.paths import resolve_image
from mmc.extract.sources.read import read_source
from mmc.store.registry import Entry

SOURCES: tuple[Entry, ...] = (
    Entry(
        "csv",
        "mmc.extract.sources.delimited:Delimited",
        "a table of text: comma, tab, semicolon or pipe separated, Kaggle files included",
        "a header line; .csv .tsv .tab .psv .txt, also .gz",
    ),
    Entry(
        "jsonl",
        "mmc.extract.sources.jsonl:JsonLines",
        "one JSON object a line, hateful-memes files included",
        ".jsonl .ndjson, also .gz",
    ),
)

__all__ = [
    "SOURCES",
    "Format",
    "Records",
    "Samples",
    "SourceOptions",
    "read_source",
    "resolve_image",
]
