"""Zeroth-order maths: directions, spaces, estimators, the log and its replay. Torch and array kernels only."""
