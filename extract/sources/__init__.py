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
        "webdataset",
        "mmc.extract.sources.webdataset:WebDataset",
        "tars of samples: standard keys, or image_<n>, caption_<n>, metadata_<n> in class folders",
        "a .tar, a folder with .tar files, a pattern such as shard_{000..012}.tar",
    ),
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
    Entry(
        "sidecars",
        "mmc.extract.sources.sidecars:Sidecars",
        "pictures, each with a JSON file of encoded labels, and a tree of tags",
        "a folder with organized_Tags.json",
    ),
    Entry(
        "mmhs",
        "mmc.extract.sources.mmhs:Mmhs",
        "MMHS150K: tweets with pictures and the labels of several annotators",
        "MMHS150K_GT.json, or its folder",
    ),
    Entry(
        "imagefolder",
        "mmc.extract.sources.imagefolder:ImageFolder",
        "pictures in folders named by their class, also below train, val and test",
        "a folder with pictures and no tables",
    ),
    Entry(
        "parquet",
        "mmc.extract.sources.parquet:Parquet",
        "a Parquet table; pictures as paths, or as bytes in it",
        ".parquet .pq",
    ),
    Entry(
        "arrow",
        "mmc.extract.sources.arrow:Arrow",
        "an Arrow table (Feather); pictures as paths, or as bytes in it",
        ".arrow .feather .ipc",
    ),
    Entry(
        "hf-saved",
        "mmc.extract.sources.saved_dataset:SavedDataset",
        "a data set saved by Hugging Face datasets (save_to_disk)",
        "a folder with dataset_dict.json, or state.json and dataset_info.json",
    ),
    Entry(
        "hf-dataset",
        "mmc.extract.sources.saved_dataset:HubDataset",
        "a data set of the Hugging Face Hub by name",
        "hf-dataset:owner/name[split], and pip install datasets",
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
