"""Where every importer hands its finds: data that lies is noticed and mended, then a trace or a load is written."""

from moeplace.profiling.imports.canonical.findings import Findings
from moeplace.profiling.imports.canonical.imported import Imported
from moeplace.profiling.imports.canonical.loads import write_load
from moeplace.profiling.imports.canonical.options import MOST_LAYERS, ImportOptions
from moeplace.profiling.imports.canonical.rows import canonical_rows, pseudo_sequences
from moeplace.profiling.imports.canonical.survey import Piece
from moeplace.profiling.imports.canonical.tokens import TraceOutline, write_trace

__all__ = [
    "MOST_LAYERS",
    "Findings",
    "ImportOptions",
    "Imported",
    "Piece",
    "TraceOutline",
    "canonical_rows",
    "pseudo_sequences",
    "write_load",
    "write_trace",
]
