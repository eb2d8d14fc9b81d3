"""SpaLLM's mathematics: a matrix sketched into lookup tables and codes. It sees matrices only."""

from fedzo.sketch.tables import kmeans_1d as kmeans_1d
