"""``fedzo rephrase``: what it takes, and what it calls."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from fedzo.cli.arguments import AddCommand, add_overrides, load_config, whole_number
from fedzo.cli.output import print_lines
from fedzo.errors import ConfigError

_PARTS = {"judge-test": 0, "bootstrap": 0, "import": 1}
"""What follows ``fedzo rephrase``, and how many words belong to it."""
_OPTIONS = {"dry_run": "", "out": "", "again": "", "pairs": "judge-test", "table": "bootstrap"}
"""Options that belong to one of them alone, or to ``fedzo rephrase`` itself."""
_TABLE = "examples.csv"


def add_rephrase(add: AddCommand) -> None:
    """``fedzo rephrase``, and its options."""
    usage = "fedzo rephrase [judge-test | bootstrap | import SETS] --task TASK --data FILE [overrides] [more options]"
    summary = "rewrite training text with a language model, checks and a judge (OAT-Rephrase)"
    own, number = add("rephrase", rephrase, summary, usage=usage), whole_number(1)
    own.add_argument("words", metavar="WHAT", nargs="*", help="judge-test, bootstrap, import SETS (default: rewrite)")
    own.add_argument("--task", metavar="TASK", required=True, help="task of the rows, as in `fedzo list task`")
    own.add_argument("--data", metavar="FILE", required=True, help="training rows (jsonl, json, csv, tsv, parquet)")
    own.add_argument("--site", metavar="FILE", help="site file whose rewriter is used")
    own.add_argument("--dry-run", type=number, metavar="N", help="show the prompts of N rows and an estimate; no call")
    own.add_argument("--out", metavar="FILE", help="also write all rows, marked, to a jsonl file")
    own.add_argument("--again", action="store_true", default=None, help="retry rows for which the endpoint failed")
    own.add_argument("--pairs", type=number, metavar="N", help="judge-test: max. pairs per kind (default: gate_pairs)")
    own.add_argument("--table", metavar="FILE", help=f"bootstrap: table (default: {_TABLE})")
    add_overrides(own)


def rephrase(arguments: Namespace) -> None:
    """``fedzo rephrase``."""
    what, words = _what(arguments.words)
    for option, of in _OPTIONS.items():
        if getattr(arguments, option) is not None and what != of:
            flag = f"--{option.replace('_', '-')}"
            others = f"`fedzo rephrase {of}`" if of else "`fedzo rephrase` alone"
            raise ConfigError(f"{flag} belongs to {others}, got {f'`{what}`' if what else 'neither'}. Leave it out.")
    out = None if arguments.out is None else Path(arguments.out)
    if out is not None and out.resolve() == Path(arguments.data).resolve():
        raise ConfigError(f"--out must not be the file of --data, got {out}. Choose another file.")
    from fedzo.config.overrides import quoted

    stage = ["preprocess=[oat_rephrase]", f"task={arguments.task}", f"data.path={quoted(arguments.data)}"]
    stage.append("partition=iid")  # rows are dealt to nobody here, so no task is refused for how they would be
    if what == "import":
        stage.append(f"preprocess.oat_rephrase.imported={'0' * 64}")  # so that no rewriter is asked for
    from fedzo.commands import rephrase as command

    site = [] if arguments.site is None else command.rewriter_of(Path(arguments.site))
    arguments.overrides = [*stage, *site, *words[_PARTS.get(what, 0) :], *arguments.overrides]
    work = command.open_work(load_config(arguments), Path(arguments.data))
    if what == "judge-test":
        return print_lines(command.judge_test(work, pairs=arguments.pairs))
    if what == "bootstrap":
        return print_lines(command.bootstrap(work, Path(arguments.table or _TABLE)))
    if what == "import":
        from fedzo.commands.rephrase_import import import_sets

        return print_lines(import_sets(work, Path(words[0])))
    if arguments.dry_run is not None:
        from fedzo.commands.rephrase_preview import dry_run

        return print_lines(dry_run(work, arguments.dry_run))
    print_lines(command.rephrase(work, out=out, again=bool(arguments.again)))


def _what(words: list[str]) -> tuple[str, list[str]]:
    first = words[0] if words and "=" not in words[0] else ""
    if first and first not in _PARTS:
        raise ConfigError(f"WHAT must be one of {', '.join(_PARTS)}, or left out, got {first!r}.")
    rest = words[1:] if first else words
    if first == "import" and (not rest or "=" in rest[0]):
        raise ConfigError("fedzo rephrase import needs SETS, a file of rewrites. Write its path after import.")
    return first, rest
