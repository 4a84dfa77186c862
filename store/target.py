"""Making an alias ready for a writer: create it, or check that it is the same and grow it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mmc.store.aliases import (
    FEATURES,
    arrays_json,
    find_alias,
    remove_alias,
    write_arrays_json,
)
from mmc.store.errors import FingerprintMismatchError, InputError
from mmc.store.files import Files
from mmc.store.layout import default_shard_rows
from mmc.store.samples import SamplesFile
from mmc.store.schema import AliasRecord, Compression, FieldSpec, Provenance, difference, dump


def check_settings(
    fields: Sequence[FieldSpec], shard_rows: int | None, compress: Compression
) -> None:
    if not fields:
        raise InputError("no fields to write; name at least one")
    names = [field.name for field in fields]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"field {name!r} is given twice")
    if shard_rows is not None and shard_rows < 1:
        raise InputError(f"shard_rows={shard_rows} must be 1 or more")
    if compress not in (None, "zstd"):
        raise InputError(f"compress={compress!r}: choose zstd or none")


class Target:
    """An alias's folder on the way to being ready for a writer."""

    def __init__(self, files: Files, alias: str, samples: SamplesFile) -> None:
        self.files = files
        self.alias = alias
        self.samples = samples
        self.prefix = f"{FEATURES}/{alias}"

    def ready(
        self,
        fields: Sequence[FieldSpec],
        provenance: Provenance,
        shard_rows: int | None,
        compress: Compression,
    ) -> AliasRecord:
        """Create the alias, or check that it is the same and add new towers; grow its arrays."""
        found = find_alias(self.files, self.alias, self.samples.meta.generation)
        if found is None:
            # Without its record a folder is what a killed writer left: nothing in it counts.
            remove_alias(self.files, self.prefix)
            largest = max(field.row_bytes for field in fields)
            record = AliasRecord(
                generation=self.samples.meta.generation,
                provenance=provenance,
                shard_rows=shard_rows or default_shard_rows(self.samples.num_rows, largest),
                compress=compress,
                fields={field.name: field for field in fields},
            )
            write_arrays_json(self.files, self.prefix, record, self.samples.num_rows)
            self._write_record(record)
            return record
        stored = found[1]
        self._check_same(stored, provenance, shard_rows, compress)
        record = self._with_new_towers(stored, fields)
        self._remove_orphans(stored, record)
        write_arrays_json(self.files, self.prefix, record, self.samples.num_rows)
        if record != stored:
            self._write_record(record)
        return record

    def _write_record(self, record: AliasRecord) -> None:
        self.files.write(f"{self.prefix}/zarr.json", [dump(record.to_json())])

    def _check_same(
        self,
        stored: AliasRecord,
        provenance: Provenance,
        shard_rows: int | None,
        compress: Compression,
    ) -> None:
        where = self.files.where(self.prefix)
        if stored.provenance.fingerprint != provenance.fingerprint:
            lines = difference(stored.provenance.identity, provenance.identity)
            raise FingerprintMismatchError(
                f"{where} was made differently; make it again with --overwrite, or keep both "
                "with another --name:\n" + "\n".join(lines)
            )
        if shard_rows not in (None, stored.shard_rows):
            raise InputError(
                f"{where} has shards of {stored.shard_rows} rows, not {shard_rows}; leave that "
                "out, or make it again with --overwrite"
            )
        if compress not in (None, stored.compress):
            raise InputError(
                f"{where} is not compressed; leave --compress out, or make it again with "
                "--overwrite"
            )

    def _with_new_towers(self, stored: AliasRecord, fields: Sequence[FieldSpec]) -> AliasRecord:
        """The record with the towers of ``fields`` that it lacks.

        Raises:
            InputError: a tower that is there has other fields, which its rows would lack.
        """
        added = dict(stored.fields)
        for tower in dict.fromkeys(field.tower for field in fields):
            asked = {field.name: field for field in fields if field.tower == tower}
            there = stored.of_tower(tower)
            if there and there != asked:
                raise InputError(
                    f"{self.files.where(self.prefix)} has {_listed(there)} for the {tower} tower "
                    f"and {_listed(asked)} was asked for; ask for the same --fields, make it "
                    "again with --overwrite, or choose another --name"
                )
            for name, field in asked.items():
                if name in added and added[name] != field:
                    raise InputError(f"field {name!r} is in the store with another tower")
                added[name] = field
        return replace(stored, fields=added)

    def _remove_orphans(self, stored: AliasRecord, record: AliasRecord) -> None:
        """Clear what a writer that was killed while adding a tower may have left of it."""
        before = dict(arrays_json(stored, 0))
        for key, _ in arrays_json(record, 0):
            if key not in before:
                self.files.remove_tree(f"{self.prefix}/{key.removesuffix('/zarr.json')}")


def _listed(fields: Mapping[str, FieldSpec]) -> str:
    return ", ".join(f"{f.name} {f.shape} {f.dtype}" for f in fields.values())
