"""What each command does: call the service and print what it gives back."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path

from fedzo.cli.arguments import load_config
from fedzo.errors import ConfigError, FedzoError, RunFolderError

Handler = Callable[[Namespace], int]


def train(arguments: Namespace) -> int:
    """``fedzo train``."""
    from fedzo.cli.train import train as run_train

    run_train(arguments.overrides)
    return 0


def resume(arguments: Namespace) -> int:
    """``fedzo resume``."""
    from fedzo.cli.train import log_to, show_result
    from fedzo.commands.train import resume_run

    folder = _folder(arguments.run)
    log_to(folder)
    resume_run(folder, rounds=arguments.rounds)
    show_result(folder)
    return 0


def replay(arguments: Namespace) -> int:
    """``fedzo replay``: the whole log, or with ``--client`` one client's local steps of a round."""
    if arguments.client is None:
        if arguments.round is not None or arguments.out is not None:
            raise ConfigError("--round and --out belong to --client. Add --client K.")
        from fedzo.commands.trained import replay_run

        _print_json(replay_run(_folder(arguments.run), rounds=arguments.rounds))
        return 0
    if arguments.round is None or arguments.rounds is not None:
        raise ConfigError("--client needs one round. Write --round R.")
    from fedzo.commands.client_path import replay_client

    out = None if arguments.out is None else Path(arguments.out)
    path = replay_client(_folder(arguments.run), client=arguments.client, round=arguments.round, out=out)
    print("\n".join(path.table()))
    return 0


def evaluate(arguments: Namespace) -> int:
    """``fedzo evaluate``."""
    from fedzo.commands.trained import evaluate_run

    _print_json(evaluate_run(_folder(arguments.run), split=arguments.split))
    return 0


def generate(arguments: Namespace) -> int:
    """``fedzo generate``: by a run's model, or by any model for rows of a file."""
    if arguments.model is not None:
        if arguments.run is not None or arguments.rows is None:
            raise ConfigError("fedzo generate --model MODEL needs --prompts FILE, and neither RUN nor PROMPT.")
        from fedzo.commands.answer import answer_rows
        from fedzo.models.config import DType, ModelConfig

        tables = [Path(name) for name in (arguments.tables or "").split(",") if name]
        model = ModelConfig(name=arguments.model, dtype=DType(arguments.dtype or DType.float32))
        return print_lines(answer_rows(model, tables, Path(arguments.rows), max_new_tokens=arguments.max_new_tokens))
    if arguments.run is None or not arguments.prompts or arguments.rows or arguments.tables or arguments.dtype:
        raise ConfigError(
            "fedzo generate needs RUN and at least one PROMPT; --prompts, --tables and --dtype belong to --model."
        )
    from fedzo.commands.trained import generate_run

    for text in generate_run(_folder(arguments.run), arguments.prompts, max_new_tokens=arguments.max_new_tokens):
        print(text)
    return 0


def export(arguments: Namespace) -> int:
    """``fedzo export``."""
    from fedzo.commands.trained import export_run

    print(export_run(_folder(arguments.run), Path(arguments.out), rounds=arguments.rounds, form=arguments.form))
    return 0


def report(arguments: Namespace) -> int:
    """``fedzo report``: a folder with ``multirun.yaml`` is a sweep; with ``--together`` one page over runs."""
    from fedzo.report.html import write_report
    from fedzo.report.sweep import write_comparison, write_sweep_report

    if arguments.together is not None:
        if arguments.out is not None:
            raise ConfigError("--together DIR must be given without --out: its page is written into DIR.")
        print(write_comparison([_folder(name) for name in arguments.runs], Path(arguments.together)))
        return 0
    if arguments.out is not None and len(arguments.runs) > 1:
        raise ConfigError(f"--out must be given with one RUN, got {len(arguments.runs)}. Call fedzo report for each.")
    out = None if arguments.out is None else Path(arguments.out)
    for folder in [_folder(name) for name in arguments.runs]:
        is_sweep = (folder / "multirun.yaml").exists()
        page = write_sweep_report(folder, out_dir=out) if is_sweep else write_report(folder, out_dir=out)
        if page is None:
            raise RunFolderError(f"{folder}: no job of this sweep has begun. Start it, or give another folder.")
        print(page)
    return 0


def mask(arguments: Namespace) -> int:
    """``fedzo mask``."""
    config = load_config(arguments)
    from fedzo.commands.mask import make_mask

    _print_json(make_mask(config, Path(arguments.out)))
    return 0


_SKETCH_SETTINGS = ("bits", "groups_per_row", "importance_power", "damping")
_SKETCH_REQUEST = ("windows", "tokens", "skip")


def sketch(arguments: Namespace) -> int:
    """``fedzo sketch``: build one, or read or write one in LeanQuant's layout."""
    sources = [arguments.calibration, arguments.import_from, arguments.export_to]
    if sum(each is not None for each in sources) != 1 or (arguments.out is None) != (arguments.export_to is not None):
        raise ConfigError(
            "fedzo sketch needs --out DIR with --calibration FILE or with --import FILE; or --export FILE alone."
        )
    of_build = (*_SKETCH_SETTINGS, *_SKETCH_REQUEST, "text")
    chosen = {name: value for name in of_build if (value := getattr(arguments, name)) is not None}
    if chosen and arguments.calibration is None:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in chosen)
        raise ConfigError(
            f"fedzo sketch: --import and --export must be given without options of a build, got {options}: the file "
            "and the sketch have their own. Leave them out."
        )
    config = load_config(arguments, trains=False)
    from fedzo.commands.sketch import SketchRequest, export_sketch, import_sketch, make_sketch
    from fedzo.sketch import SketchSettings

    if arguments.export_to is not None:
        return print_lines(export_sketch(config, Path(arguments.export_to)))
    if arguments.import_from is not None:
        return print_lines(import_sketch(config, Path(arguments.import_from), Path(arguments.out)))
    request = SketchRequest(
        out=Path(arguments.out),
        settings=SketchSettings(**{name: chosen[name] for name in _SKETCH_SETTINGS if name in chosen}),
        calibration=Path(arguments.calibration),
        text=None if arguments.text is None else Path(arguments.text),
        **{name: chosen[name] for name in _SKETCH_REQUEST if name in chosen},
    )
    return print_lines(make_sketch(config, request))


def perplexity(arguments: Namespace) -> int:
    """``fedzo perplexity``."""
    from rich.console import Console
    from rich.progress import Progress

    config = load_config(arguments, trains=False)
    from fedzo.commands.perplexity import measure_perplexity

    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("windows", total=None)
        found = measure_perplexity(
            config,
            Path(arguments.text),
            num_tokens=arguments.tokens,
            num_windows=arguments.windows,
            on_window=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    _print_json(found)
    return 0


def bench(arguments: Namespace) -> int:
    """``fedzo bench step``."""
    from fedzo.cli.bench import step

    step(arguments)
    return 0


def list_options(arguments: Namespace) -> int:
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
    return 0


def doctor(arguments: Namespace) -> int:
    """``fedzo doctor``; 1 when a check failed."""
    from fedzo.commands.doctor import doctor as run_checks

    checks = run_checks()
    if arguments.dir is not None:
        from fedzo.commands.doctor import folder_checks

        checks += folder_checks(Path(arguments.dir))
    for name, good, detail in checks:
        print(f"{'ok  ' if good else 'BAD '} {name}: {detail}")
    return 0 if all(good for _, good, _ in checks) else 1


def server(arguments: Namespace) -> int:
    """``fedzo server``."""
    import socket

    from fedzo.commands import server as commands
    from fedzo.runtime.net.server_folder import ServerFolder

    folder = ServerFolder(Path(arguments.dir))
    match arguments.what:
        case "init":
            hosts = arguments.host or [socket.gethostname()]
            ports = {"port": arguments.port, "control_port": arguments.control_port}
            lines = commands.init(Path(arguments.dir), hosts=hosts, days=arguments.days, **ports)
        case "add-client":
            lines = commands.add_client(folder, arguments.name, index=arguments.index, key=arguments.key)
        case "remove-client":
            lines = commands.remove_client(folder, arguments.name)
        case "renew":
            lines = commands.renew(folder, hosts=arguments.host or [], days=arguments.days)
        case _:
            return _keep(commands.up(folder))
    return print_lines(lines)


def client(arguments: Namespace) -> int:
    """``fedzo client``."""
    from fedzo.commands import client as commands
    from fedzo.runtime.net.client_folder import ClientFolder

    path = Path(arguments.dir)
    if arguments.what == "up":
        return _keep(commands.up(ClientFolder(path)))
    files = [Path(name) if name else None for name in (arguments.invitation, arguments.ca)]
    return print_lines(commands.init(path, server=arguments.server, invitation=files[0], authority=files[1]))


def status(arguments: Namespace) -> int:
    """``fedzo status``."""
    from fedzo.commands.status import status as lines_of

    return print_lines(lines_of(Path(arguments.dir)))


def stop(arguments: Namespace) -> int:
    """``fedzo stop``."""
    from fedzo.commands.status import stop as stop_run

    return print_lines(stop_run(_folder(arguments.run)))


def _keep(lines: Iterable[str]) -> int:
    """Show what a service says until it is told to end, which is no failure."""
    try:
        return print_lines(lines)
    except KeyboardInterrupt:
        print("ended", flush=True)
        return 0


def print_lines(lines: Iterable[str]) -> int:
    """Show lines as they come; a file that cannot be read or written is named."""
    kind: type[FedzoError] = ConfigError
    try:
        for line in lines:
            print(line, flush=True)
            kind = FedzoError  # for something was done
    except OSError as error:
        if isinstance(error, FedzoError):
            raise
        file = error.filename or "a file"
        if isinstance(error, FileNotFoundError):
            raise kind(f"{file}: there is no such file or folder. Check the path.") from error
        raise kind(f"{file}: it must be readable and writable, got {error.strerror!r}.") from error
    return 0


def _folder(name: str) -> Path:
    folder = Path(name)
    if not folder.is_dir():
        raise ConfigError(f"RUN must be a folder that `fedzo train` made, found none at {name!r}. Check the path.")
    return folder


def _print_json(record: object) -> None:
    print(json.dumps(record, indent=2))
