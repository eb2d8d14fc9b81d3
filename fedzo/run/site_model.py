"""The model that a site's process keeps between runs: it is loaded once a site, not once a run."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, replace

from torch import nn

from fedzo.config.schema import SiteConfig
from fedzo.errors import FedzoError
from fedzo.models.load import check_length
from fedzo.models.loaded import ForwardCounter, LoadedModel
from fedzo.models.source import find_source
from fedzo.run.peer import Peer, open_model, set_up_process

log = logging.getLogger(__name__)
_BESIDE = ("*.json", "*.jinja", "*.model", "*.txt")
"""Configuration, tokenizer and chat template."""


@dataclass(slots=True)
class _Held:
    loaded: LoadedModel
    key: object
    structure: object


class SiteModel:
    """At most one model, as it was loaded.

    A run has it for itself and gives it back. What a run has made of it is undone: its values are the base's again, and
    it has no adapter. A model that is another one then, in its modules, hooks or settings, is let go.
    """

    def __init__(self) -> None:
        self._held: _Held | None = None
        self._lent: tuple[weakref.ref[nn.Module], object, object] | None = None

    def load_ahead(self, site: SiteConfig) -> None:
        """Load the model before a run asks for it. Whatever is wrong with it is told to the run that does."""
        if not _can_be_kept(site):
            return
        try:
            self.open(site, 1)
        except Exception as error:  # of a driver: its GPU may be free by then
            log.error("%s", error, exc_info=not isinstance(error, FedzoError))

    def open(self, site: SiteConfig, max_length: int) -> LoadedModel:
        """The site's model, loaded if it is not here, for texts of at most ``max_length`` tokens.

        Raises:
            ConfigError: It cannot be loaded, or used at ``max_length``.
        """
        key = _key(site)
        if self._held is not None and self._held.key == key and _can_be_kept(site):
            set_up_process(site.threads, site.device)
            check_length(self._held.loaded.model, max_length, name=site.model.name)
            return replace(self._held.loaded, counter=ForwardCounter())
        self._held = None  # let the old model go before a new one is loaded
        loaded = open_model(site, max_length)
        self._held = _Held(loaded, key, _structure(loaded.model))
        return loaded

    def lend(self) -> None:
        """A run holds the model from now on, and alone, for it may exchange it for another."""
        held, self._held = self._held, None
        self._lent = (weakref.ref(held.loaded.model), held.key, held.structure) if held else None

    def is_as_lent(self, site: SiteConfig) -> bool:
        """Whether the model that a run has is still the site's: of the same settings, and of files as they were."""
        return self._lent is not None and self._lent[1] == _key(site)

    def take_back(self, peer: Peer) -> None:
        """Have the model back from a run that is over."""
        lent, self._lent = self._lent, None
        if lent is None or lent[0]() is not peer.loaded.model:
            return
        peer.reset()
        if _structure(peer.loaded.model) == lent[2]:
            self._held = _Held(peer.loaded, *lent[1:])


def _can_be_kept(site: SiteConfig) -> bool:
    """Not where it is compiled: for the longest text of one run."""
    return not site.model.compile


def _key(site: SiteConfig) -> object:
    """What the model was loaded by, and of which files: its weights, and what lies beside them."""
    weights = find_source(site.model).files
    beside = {file for each in weights for ending in _BESIDE for file in each.parent.glob(ending) if file.is_file()}
    files = [*weights, *sorted(beside)]
    states = [(file.name, file.stat()) for file in files]
    told = [(name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states]
    return site.model, site.device, told


def _structure(model: nn.Module) -> object:
    """All that a run could leave behind in a model, beside values."""
    modules = [
        (name, type(module), len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
        for name, module in model.named_modules()
    ]
    parameters = [(name, each.dtype, each.shape, each.requires_grad) for name, each in model.named_parameters()]
    return modules, parameters, str(model.config)
