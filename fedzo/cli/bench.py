"""``fedzo bench``: measure this machine and print a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedzo.bench.measure import free_memory
from fedzo.bench.step import bench_step, open_bench, peak_bytes
from fedzo.cli.arguments import load_config
from fedzo.errors import ConfigError
from fedzo.report.format import MISSING, bytes_text

# freed tensors go back to the system at once, so that resident pages show what is in use
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def step(arguments: Namespace) -> None:
    """Time a step; or, in a child process, measure the memory of one contestant's."""
    config = load_config(arguments)
    sizes: dict[str, Any] = {"shape": arguments.shape, "rows": arguments.rows, "tokens": arguments.tokens}
    if arguments.peak_of is not None:
        print(json.dumps(peak_bytes(config, arguments.peak_of, **sizes)))
        return
    if arguments.out is not None and not Path(arguments.out).absolute().parent.is_dir():
        raise ConfigError(f"--out must lie in an existing folder, got {arguments.out!r}. Make the folder first.")
    bench = open_bench(config, **sizes)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        timing = progress.add_task("repeats", total=arguments.repeats)
        result = bench_step(
            bench,
            repeats=arguments.repeats,
            on_repeat=lambda done, total: progress.update(timing, completed=done),
        )
        if not arguments.no_memory:
            del bench
            free_memory()  # beside this model, a child's may not fit
            for figure in progress.track(result["figures"], description="peak memory"):
                figure["peak_bytes"] = _peak_in_child(figure["name"])
    result["command"] = "fedzo " + " ".join(sys.argv[1:])
    Console(width=max(100, Console().width)).print(_table(result))  # a pipe has 80 columns, the table a few more
    if arguments.out is not None:
        Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _peak_in_child(name: str) -> int | None:
    """The same command in a fresh process, whose allocator has nothing left over from earlier work."""
    command = [sys.executable, "-m", "fedzo", *sys.argv[1:], "--peak-of", name]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_ALLOCATOR})
    if done.returncode != 0:  # out of memory, most likely: the other figures still stand
        print(f"peak memory of {name!r} was not measured: {done.stderr.strip()[-300:]}", file=sys.stderr)
        return None
    value = json.loads(done.stdout.strip().splitlines()[-1])
    return None if value is None else int(value)


def _table(result: dict[str, Any]) -> Table:
    lower = result["first_layer"]
    table = Table(
        title=f"{result['model']}, {result['num_params']:,} weights of which {result['space_size']:,} trained"
        f"{', none below block ' * bool(lower)}{lower or ''}, "
        f"{result['dtype']}, {result['forwards']} forwards, on {result['device']} ({result['device_name']}), "
        f"{result['rows']} x {result['tokens']} tokens, {result['repeats']} repeats",
        title_justify="left",
    )
    forwards = f"of {result['forwards_per_step']} forwards"
    for name in ("", "seconds", forwards, "quartiles", "peak memory", "of forwards"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    bare = result["figures"][0]["peak_bytes"]
    for figure in result["figures"]:
        peak = figure["peak_bytes"]
        table.add_row(
            figure["name"],
            f"{figure['median_s']:.4f}",
            f"{figure['ratio']:.3f}",
            "{:.3f} {:.3f}".format(*figure["ratio_quartiles"]),
            bytes_text(peak),
            f"{peak / bare:.3f}" if peak and bare else MISSING,
        )
    return table
