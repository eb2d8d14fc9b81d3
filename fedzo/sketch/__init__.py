"""SpaLLM's mathematics: a matrix sketched into lookup tables and codes. It sees matrices and linear layers."""

from fedzo.sketch.build import Sketch as Sketch
from fedzo.sketch.build import SketchSettings as SketchSettings
from fedzo.sketch.build import sketch_matrix as sketch_matrix
from fedzo.sketch.linear import SketchLinear as SketchLinear
from fedzo.sketch.linear import sketched_layers as sketched_layers
from fedzo.sketch.linear import sketched_linear as sketched_linear
from fedzo.sketch.linear import tables_of as tables_of
from fedzo.sketch.packing import check_shapes as check_shapes
from fedzo.sketch.packing import decode as decode
from fedzo.sketch.packing import pack as pack
from fedzo.sketch.packing import packed_width as packed_width
from fedzo.sketch.packing import unpack as unpack
from fedzo.sketch.table_space import OwnTables as OwnTables
from fedzo.sketch.table_space import TableSpace as TableSpace
from fedzo.sketch.tables import kmeans_1d as kmeans_1d
