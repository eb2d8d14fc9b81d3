"""Federated fine-tuning of language models with forward passes only."""

from importlib import import_module
from typing import Any

from wrapt import when_imported

__version__ = "0.1.0"


@when_imported("transformers.quantizers.auto")
def _let_transformers_read_sketches(_: Any) -> None:
    import_module("fedzo.models.sketched.registry")  # it registers itself
