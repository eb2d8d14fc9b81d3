"""Spaces: which values are trained, and how they are moved and put back."""
