"""Federated zeroth-order fine-tuning of language models: forward passes only, one number per probe."""

from importlib import import_module
from typing import Any

from wrapt import when_imported

__version__ = "0.2.0.dev0"


@when_imported("transformers.quantizers.auto")
def _let_transformers_read_sketches(_: Any) -> None:
    import_module("fedzo.models.sketched.registry")  # it registers itself
