"""The embedding store: a sharded zarr v3 group of features beside a table of samples."""

from mmc.store.feature import Feature as Feature
from mmc.store.reader import EmbeddingStore as EmbeddingStore
from mmc.store.samples import Labels as Labels
from mmc.store.schema import FieldSpec as FieldSpec
from mmc.store.schema import Provenance as Provenance
from mmc.store.sync import SyncReport as SyncReport
from mmc.store.verify import CompactReport as CompactReport
from mmc.store.verify import Problem as Problem
from mmc.store.verify import compact as compact
from mmc.store.verify import conclusion as conclusion
from mmc.store.verify import repair as repair
from mmc.store.verify import verify as verify
from mmc.store.writer import Writer as Writer
