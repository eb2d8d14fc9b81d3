"""Commands of runs, and of this machine: what they take, and what they call and print."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from fedzo.cli.arguments import AddCommand, add_rounds, add_run, run_folder, total_rounds, whole_number
from fedzo.cli.output import print_json, print_lines
from fedzo.errors import ConfigError, RunFolderError

_COUNT, _POSITIVE = whole_number(0), whole_number(1)


def add_run_commands(add: AddCommand) -> None:
    """From ``fedzo train`` to ``fedzo report``."""
    own = add("train", train, "run a federation, or with -m a sweep: fedzo train [overrides] [-m] [--help]")
    own.set_defaults(takes_overrides=True, takes_flags=True, resumable=True)

    own = add("resume", resume, "continue a run that was stopped, or make it longer")
    add_run(own)
    more = "new total number of rounds, above the present one; no other setting of a run can change"
    own.add_argument("rounds", metavar="fl.rounds=N", nargs="?", type=total_rounds, help=more)
    own.set_defaults(resumable=True)

    own = add("replay", replay, "verify the log of a run: rebuild its model and compare every hash")
    add_run(own)
    add_rounds(own, "rounds to replay (default: all)")
    own.add_argument("--client", type=_COUNT, help="rebuild this client's local steps of --round instead")
    own.add_argument("--round", type=_COUNT, help="round of --client, from 0")
    own.add_argument("--out", metavar="FILE", help="with --client: write the values after each step (safetensors)")

    own = add("evaluate", evaluate, "score a run's model on its test or dev rows")
    add_run(own)
    own.add_argument("--split", choices=("test", "dev"), default="test", help="which rows (default: test)")
    add_rounds(own, "rounds after which to score it (default: the best round)")

    usage = "fedzo generate RUN PROMPT... | fedzo generate --model MODEL --prompts FILE"
    usage += " [--tables FILE,FILE,...] [--dtype DTYPE] [--chat]"
    own = add("generate", generate, "continue prompts with a run's model, or with any model", usage=usage)
    own.add_argument("run", metavar="RUN", nargs="?", help="run folder")
    own.add_argument("prompts", metavar="PROMPT", nargs="*", help="text to continue")
    own.add_argument("--model", metavar="MODEL", help="a model folder or hub name instead of a run")
    own.add_argument("--prompts", dest="rows", metavar="FILE", help="rows: column prompt, and optionally column tables")
    own.add_argument("--tables", metavar="FILE,...", help="sketch: files of fedzo export --tables, one per user")
    dtypes = ("float32", "bfloat16", "float16")
    own.add_argument("--dtype", choices=dtypes, help="with --model: weight dtype (default: float32)")
    chat = "with --model: put each prompt into the model's chat template, as runs of task.kind=instruction do"
    own.add_argument("--chat", action="store_true", help=chat)
    own.add_argument("--max-new-tokens", type=_POSITIVE, default=32, help="longest continuation (default: 32)")

    own = add("export", export, "write a run's model as a Hugging Face folder")
    add_run(own)
    own.add_argument("out", metavar="OUT", help="new folder, or new file for --tables")
    add_rounds(own, "rounds to apply (default: up to the best round)")
    form = own.add_mutually_exclusive_group()
    form.set_defaults(form="model")
    form.add_argument(
        "--tables", dest="form", action="store_const", const="tables", help="sketch: only its trained tables"
    )
    form.add_argument(
        "--dense", dest="form", action="store_const", const="dense", help="sketch: the equivalent dense model"
    )

    own = add("report", report, "rewrite report.html of runs or sweeps")
    own.add_argument("runs", metavar="RUN", nargs="+", help="run or sweep folder")
    own.add_argument("--out", metavar="DIR", help="write into this folder instead (default: RUN)")
    own.add_argument("--together", metavar="DIR", help="write one page that compares these runs, into this folder")


def train(arguments: Namespace) -> None:
    """``fedzo train``."""
    from fedzo.cli.train import train as run_train

    run_train(arguments.overrides)


def resume(arguments: Namespace) -> None:
    """``fedzo resume``."""
    from fedzo.cli.train import log_to, show_result
    from fedzo.commands.resume import resume_run

    folder = run_folder(arguments.run)
    log_to(folder)
    resume_run(folder, rounds=arguments.rounds)
    show_result(folder)


def replay(arguments: Namespace) -> None:
    """``fedzo replay``: the whole log, or with ``--client`` one client's local steps of a round."""
    if arguments.client is None:
        if arguments.round is not None or arguments.out is not None:
            raise ConfigError("--round and --out belong to --client. Add --client K.")
        from fedzo.commands.replay import replay_run

        print_json(replay_run(run_folder(arguments.run), rounds=arguments.rounds))
        return
    if arguments.round is None or arguments.rounds is not None:
        raise ConfigError("--client needs one round. Write --round R.")
    from fedzo.commands.replay import replay_client

    out = None if arguments.out is None else Path(arguments.out)
    path = replay_client(run_folder(arguments.run), client=arguments.client, round=arguments.round, out=out)
    print("\n".join(path.table()))


def evaluate(arguments: Namespace) -> None:
    """``fedzo evaluate``."""
    from fedzo.commands.evaluate import evaluate_run

    print_json(evaluate_run(run_folder(arguments.run), split=arguments.split, rounds=arguments.rounds))


def generate(arguments: Namespace) -> None:
    """``fedzo generate``: by a run's model, or by any model for rows of a file."""
    if arguments.model is not None:
        if arguments.run is not None or arguments.rows is None:
            raise ConfigError("fedzo generate --model MODEL needs --prompts FILE, and neither RUN nor PROMPT.")
        from fedzo.commands.generate import answer_rows
        from fedzo.models.config import DType, ModelConfig

        tables = [Path(name) for name in (arguments.tables or "").split(",") if name]
        model = ModelConfig(name=arguments.model, dtype=DType(arguments.dtype or DType.float32))
        rows, most = Path(arguments.rows), arguments.max_new_tokens
        return print_lines(answer_rows(model, tables, rows, max_new_tokens=most, chat=arguments.chat))
    of_model = arguments.rows or arguments.tables or arguments.dtype or arguments.chat
    if arguments.run is None or not arguments.prompts or of_model:
        raise ConfigError(
            "fedzo generate needs RUN and at least one PROMPT; --prompts, --tables, --dtype and --chat belong to "
            "--model."
        )
    from fedzo.commands.generate import generate_run

    for text in generate_run(run_folder(arguments.run), arguments.prompts, max_new_tokens=arguments.max_new_tokens):
        print(text)


def export(arguments: Namespace) -> None:
    """``fedzo export``."""
    from fedzo.commands.export import export_run

    print(export_run(run_folder(arguments.run), Path(arguments.out), rounds=arguments.rounds, form=arguments.form))


def report(arguments: Namespace) -> None:
    """``fedzo report``: a folder with ``multirun.yaml`` is a sweep; with ``--together`` one page over runs."""
    from fedzo.records.folder import MULTIRUN
    from fedzo.report.html import write_report
    from fedzo.report.sweep import write_comparison, write_sweep_report

    if arguments.together is not None:
        if arguments.out is not None:
            raise ConfigError("--together DIR must be given without --out: its page is written into DIR.")
        print(write_comparison([run_folder(name) for name in arguments.runs], Path(arguments.together)))
        return
    if arguments.out is not None and len(arguments.runs) > 1:
        raise ConfigError(f"--out must be given with one RUN, got {len(arguments.runs)}. Call fedzo report for each.")
    out = None if arguments.out is None else Path(arguments.out)
    for folder in [run_folder(name) for name in arguments.runs]:
        is_sweep = (folder / MULTIRUN).exists()
        page = write_sweep_report(folder, out_dir=out) if is_sweep else write_report(folder, out_dir=out)
        if page is None:
            raise RunFolderError(f"{folder}: no job of this sweep has begun. Start it, or give another folder.")
        print(page)


def add_machine_commands(add: AddCommand) -> None:
    """``fedzo list`` and ``fedzo doctor``."""
    own = add("list", list_options, "list the config groups and their options")
    own.add_argument("group", metavar="GROUP", nargs="?", help="only this group")

    own = add("doctor", doctor, "check this machine, or a server's or a site's folder")
    own.add_argument("dir", metavar="DIR", nargs="?", help="also check this server or client folder")


def list_options(arguments: Namespace) -> None:
    """``fedzo list``."""
    from fedzo.config.plugins import list_groups

    groups = list_groups()
    if arguments.group is not None:
        if arguments.group not in groups:
            known = ", ".join(groups)
            raise ConfigError(f"GROUP must be one of {known}, got {arguments.group!r}.")
        groups = {arguments.group: groups[arguments.group]}
    for group, options in groups.items():
        print(group)
        width = max((len(name) for name in options), default=0)
        for name, summary in options.items():
            print(f"  {name:<{width}}  {summary}".rstrip())


def doctor(arguments: Namespace) -> int:
    """``fedzo doctor``; 1 when a check failed."""
    from fedzo.commands.doctor import doctor as run_checks

    checks: Iterable[tuple[str, bool, str]] = run_checks()
    if arguments.dir is not None:
        from fedzo.commands.doctor import folder_checks

        checks = chain(checks, folder_checks(Path(arguments.dir)))
    fit = True
    for name, good, detail in checks:
        print(f"{'ok  ' if good else 'BAD '} {name}: {detail}", flush=True)  # before a model that may take minutes
        fit = fit and good
    return 0 if fit else 1
