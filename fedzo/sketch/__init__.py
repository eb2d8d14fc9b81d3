"""SpaLLM's mathematics: a matrix sketched into lookup tables and codes. It sees matrices and linear layers."""

from fedzo.sketch.build import Sketch, SketchSettings, sketch_matrix
from fedzo.sketch.linear import SketchLinear, sketched_layers, sketched_linear, tables_of
from fedzo.sketch.packing import check_shapes, decode, pack, packed_width, unpack
from fedzo.sketch.table_space import OwnTables, TableSpace
from fedzo.sketch.tables import kmeans_1d

__all__ = [
    "Sketch",
    "SketchSettings",
    "sketch_matrix",
    "SketchLinear",
    "sketched_layers",
    "sketched_linear",
    "tables_of",
    "check_shapes",
    "decode",
    "pack",
    "packed_width",
    "unpack",
    "OwnTables",
    "TableSpace",
    "kmeans_1d",
]
