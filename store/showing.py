"""What ``mmc info`` shows, as text."""

from collections.abc import Mapping, Sequence
from typing import Any

LABELS_SHOWN, PARENTS_SHOWN = 20, 5
_UNITS = ("B", "kB", "MB", "GB", "TB")


def format_summary(info: Mapping[str, Any]) -> str:
    """The result of `EmbeddingStore.info` as a page of text."""
    gone = f" ({info['gone']:,} more are gone from their source)" if info["gone"] else ""
    splits = ", ".join(f"{name or 'no split'} {count:,}" for name, count in info["splits"].items())
    lines = [
        f"{info['path']}: format {info['format']}, {format_bytes(info['bytes'])}",
        f"samples  {info['rows']:,}{gone}: {splits}",
        f"task     {info['task']}, {len(info['labels'])} labels, {info['labelled']:,} labelled",
        *_unknown(info),
        *_tree(info["label_tree"]),
        *(f"source   {source['spec']}" for source in info["sources"]),
        "",
        *_features(info),
        *_labels(info["labels"], info["unknown_labels"]),
    ]
    for alias, record in info["aliases"].items():
        lines += ["", *_provenance(alias, record)]
    return "\n".join(lines)


def _unknown(info: Mapping[str, Any]) -> list[str]:
    """One line about single labels that are unknown."""
    if not info["partly_labelled"]:
        return []
    entries, rows = sum(info["unknown_labels"].values()), info["partly_labelled"]
    labels = len(info["unknown_labels"])
    return [f"unknown  {entries:,} single labels of {rows:,} samples, in {labels:,} labels"]


def _tree(tree: Mapping[str, Sequence[str]]) -> list[str]:
    """One line about a label tree: how large it is, and its largest parents."""
    if not tree:
        return []
    children = len({child for group in tree.values() for child in group})
    largest = sorted(tree.items(), key=lambda item: -len(item[1]))[:PARENTS_SHOWN]
    shown = ", ".join(f"{parent} ({len(group)})" for parent, group in largest)
    more = f", {len(tree) - len(largest)} more" if len(tree) > len(largest) else ""
    return [f"tree     {len(tree)} parents over {children} labels: {shown}{more}"]


def _features(info: Mapping[str, Any]) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("feature", "shape", "dtype", "done", "failed", "missing", "size")
    ]
    for alias, record in info["aliases"].items():
        for name, field in record["features"].items():
            counts = (f"{field[key]:,}" for key in ("done", "failed", "missing"))
            shape = " x ".join(str(n) for n in field["shape"])
            size = format_bytes(field["bytes"])
            rows.append((f"{alias}/{name}", shape, str(field["dtype"]), *counts, size))
    if len(rows) == 1:
        return ["no features yet: run `mmc extract`"]
    return _align(rows)


def _labels(counts: Mapping[str, int], unknown: Mapping[str, int]) -> list[str]:
    if not counts:
        return []
    most = sorted(counts.items(), key=lambda item: -item[1])[:LABELS_SHOWN]
    rest = len(counts) - len(most)
    rows: list[tuple[str, ...]] = [("label", "samples"), *((n, f"{c:,}") for n, c in most)]
    if unknown:
        last = ["unknown", *(f"{unknown.get(name, 0):,}" for name, _ in most)]
        rows = [(*row, cell) for row, cell in zip(rows, last, strict=True)]
    lines = ["", *_align(rows)]
    return [*lines, f"and {rest:,} labels with fewer samples"] if rest else lines


def _provenance(alias: str, record: Mapping[str, Any]) -> list[str]:
    """Where an alias comes from: fingerprint, then identity and context key by key."""
    lines = [f"{alias}: fingerprint {record['fingerprint'][:16]}"]
    if record["label_text"]:
        texts = record["label_text"]
        lines.append(f"  label texts: {texts['labels']} as {texts['prompt']!r}")
    for part in ("identity", "context"):
        lines += [f"  {key}: {value}" for key, value in sorted(_flat(record[part]).items())]
    return lines


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def format_bytes(count: float) -> str:
    """A size with three digits or so: 12.3 MB."""
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 else f"{count:.1f} {_UNITS[unit]}"


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of equal width; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = (
        [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    )
    return ["  ".join(row) for row in cells]
