"""A sketch as a model format: dense layers replaced by ``SketchLinear``, folders, and transformers' registry."""
