"""A run that notes what the parts of its start take: ``python experiments/start/parts.py FILE BEGUN WORDS...``.

``run.py`` starts it. FILE gets, as JSON, the seconds of each part and of all of the start. BEGUN is the time, by the
monotonic clock, at which this process was started. WORDS are those of ``fedzo train``. A part is what some functions of
fedzo take, with what they import, and without what other parts take within them.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTS = {
    "settings, composed and checked": (
        "fedzo.cli.train:load",
        "fedzo.cli.train:with_models",
        "fedzo.cli.train:checked",
    ),
    "rows, read": ("fedzo.data.rows:load_splits",),
    "rows, dealt to clients": ("fedzo.data.rows:partition",),
    "rows, as tokens": ("fedzo.run.peer:Peer.encode",),
    "threads and products, chosen": ("fedzo.run.peer:set_up_process",),
    "the model, loaded": ("fedzo.run.peer:load_model",),
    "the trainer, prepared": ("fedzo.run.start:prepare_trainer",),
    "the space, made and checked": ("fedzo.run.peer:Peer.workspace",),
    "the clients, registered": ("fedzo.fl.server.client_registry:ClientRegistry.wait",),
    "the estimate": ("fedzo.run.federation:estimate_run",),
    "kernels of directions, loaded by Numba and run": (
        "fedzo.zo.directions:make_words",
        "fedzo.zo.directions:halves_kernel",
        "fedzo.zo.directions:add_kernel",
    ),
}
"""Functions by the name of their part, each where it is looked up when it is called."""
FIRST_ROUND = "fedzo.fl.server.rounds:Server.run_round"
IMPORTS = "Python, and the imports of these parts"
Function = Callable[..., Any]


def main(arguments: list[str]) -> int:
    file, begun, *words = arguments
    from fedzo.system import quiet_libraries

    quiet_libraries()  # before they are imported, as a command does
    seconds: dict[str, float] = {}
    within: list[float] = []
    for part, places in PARTS.items():
        for place in places:
            replace(place, lambda work, part=part: timed(work, part, seconds, within))

    def write() -> None:
        total = time.monotonic() - float(begun)
        Path(file).write_text(json.dumps({"parts": seconds, "total": total}))

    replace(FIRST_ROUND, lambda work: announced(work, write))
    seconds[IMPORTS] = time.monotonic() - float(begun)
    from fedzo.cli import main as fedzo

    return fedzo(["train", *words])


def timed(work: Function, part: str, seconds: dict[str, float], within: list[float]) -> Function:
    """``work``, whose time is added to that of its part; ``within`` has what other parts took in those that run."""

    def run(*args: Any, **options: Any) -> Any:
        begin = time.monotonic()
        within.append(0.0)
        try:
            return work(*args, **options)
        finally:
            spent = time.monotonic() - begin
            seconds[part] = seconds.get(part, 0.0) + spent - within.pop()
            if within:
                within[-1] += spent

    return run


def announced(work: Function, tell: Callable[[], None]) -> Function:
    """``work``, before whose first call ``tell`` is called."""
    calls: list[Callable[[], None]] = [tell]

    def run(*args: Any, **options: Any) -> Any:
        if calls:
            calls.pop()()
        return work(*args, **options)

    return run


def replace(place: str, changed: Callable[[Function], Function]) -> None:
    """Put another function in a place: ``module:name`` or ``module:Class.name``."""
    module, _, path = place.partition(":")
    *outer, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for each in outer:
        owner = getattr(owner, each)
    setattr(owner, name, changed(getattr(owner, name)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
