"""Shipped test helpers: tiny models, slow twins, conformance checks."""
