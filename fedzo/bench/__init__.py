"""Measurements of a machine: what a step costs beside the forwards it cannot do without."""
