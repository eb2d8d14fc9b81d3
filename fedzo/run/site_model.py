"""The model that a process keeps from run to run, a site's or that of a sweep's jobs: it is loaded and hashed once."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from fedzo.config.schema import SiteConfig
from fedzo.errors import FedzoError
from fedzo.models.digest import parameters_digest
from fedzo.models.load import check_length
from fedzo.models.loaded import ForwardCounter, LoadedModel
from fedzo.models.source import find_source
from fedzo.run.peer import Peer, open_model, set_up_process

log = logging.getLogger(__name__)
_BESIDE = ("*.json", "*.jinja", "*.model", "*.txt")
"""Configuration, tokenizer and chat template."""


class _Load(NamedTuple):
    """How a model was loaded.

    Attributes:
        key: By which settings, and of which files.
        state: What it was then; None where no other run can have it.
        told: The warnings that were given: logger, level and text of each.
    """

    key: object
    state: object
    told: list[tuple[str, int, str]]


class _Held(NamedTuple):
    loaded: LoadedModel
    load: _Load


class SiteModel:
    """At most one model, as it was loaded.

    A run has it for itself and gives it back. What a run has made of it is undone: its values are the base's again, and
    it has no adapter. A model that is another one then, in a bit, or in its modules, hooks or settings, is let go.
    """

    def __init__(self) -> None:
        self._held: _Held | None = None
        self._lent: tuple[weakref.ref[nn.Module], _Load] | None = None

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
        if self._held is not None and self._held.load.key == key and _can_be_kept(site):
            loaded, load = self._held
            set_up_process(site.threads, site.device)
            check_length(loaded.model, max_length, name=site.model.name)
            for name, level, text in load.told:  # each run's log has what it would have alone
                logging.getLogger(name).log(level, "%s", text)
            return replace(loaded, counter=ForwardCounter())
        self._held = None  # let the old model go before a new one is loaded
        with _warnings() as told:
            loaded = open_model(site, max_length)
        state = _state(loaded.model) if _can_be_kept(site) else None
        self._held = _Held(loaded, _Load(key, state, told))
        return loaded

    def lend(self) -> None:
        """A run holds the model from now on, and alone, for it may exchange it for another."""
        held, self._held = self._held, None
        self._lent = None if held is None else (weakref.ref(held.loaded.model), held.load)

    def is_as_lent(self, site: SiteConfig) -> bool:
        """Whether the model that a run has is still the site's: of the same settings, and of files as they were."""
        return self._lent is not None and self._lent[1].key == _key(site)

    def take_back(self, peer: Peer) -> None:
        """Have the model back from a run that is over. One that cannot be had back as it was is let go."""
        lent, self._lent = self._lent, None
        if lent is None or lent[0]() is not peer.loaded.model or lent[1].state is None:
            return
        if peer.loaded.reads_whole and not peer.config.trainer.traits.float32_master:
            return  # its weights were trained: to read them again would make a second model beside it
        try:
            peer.reset()
            if _state(peer.loaded.model) == lent[1].state:
                self._held = _Held(peer.loaded, lent[1])
        except Exception as error:  # its files are gone, or its GPU: who loads it anew is told
            log.info("%s: the model is let go: %s", peer.loaded.source, error)

    def forget(self) -> None:
        """Let the model go; from a run that has it, it is not taken back."""
        self._held = self._lent = None


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


def _state(model: nn.Module) -> object:
    """All that a run could leave behind in a model: it takes a pass over its memory, and no second copy."""
    modules = [
        (name, type(module), {key: _setting(value) for key, value in vars(module).items() if value is not None})
        for name, module in model.named_modules()
    ]
    parameters = [(name, each.stride(), each.requires_grad) for name, each in model.named_parameters()]
    return modules, parameters, str(model.config), parameters_digest(_tensors(model))


def _setting(value: object) -> object:
    """An attribute of a module: a plain value as it is, of hooks and other dictionaries the keys, of the rest the type.

    Some models keep there what their last forward was, such as the longest text so far (dynamic rope).
    """
    if isinstance(value, dict):
        return [*value]
    return value if isinstance(value, bool | int | float | str) else type(value)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's tensors by name, without weights that a library packs in a class of its own: nobody trains these."""
    named: list[tuple[str, torch.Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, module in model.named_modules():
        named += [(f"{name}.{key}", each) for key, each in vars(module).items() if isinstance(each, torch.Tensor)]
    return ((name, each.data) for name, each in named if type(each.data) is torch.Tensor)


@contextmanager
def _warnings() -> Iterator[list[tuple[str, int, str]]]:
    """What fedzo warns of meanwhile."""
    handler = _Warnings()
    logger = logging.getLogger("fedzo")
    logger.addHandler(handler)
    try:
        yield handler.told
    finally:
        logger.removeHandler(handler)


class _Warnings(logging.Handler):
    """Keeps the warnings that it is given."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.funcName != check_length.__name__:  # which is asked again, for the run's own texts
            self.told.append((record.name, record.levelno, record.getMessage()))
