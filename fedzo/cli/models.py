"""Commands of models, and of what is made for them ahead of runs: what they take, and what they call and print."""

from __future__ import annotations

from argparse import SUPPRESS, Namespace
from pathlib import Path

from fedzo.cli.arguments import AddCommand, add_overrides, load_config, whole_number
from fedzo.cli.output import print_json, print_lines
from fedzo.cli.rephrase import add_rephrase
from fedzo.errors import ConfigError

_POSITIVE = whole_number(1)


def add_model_commands(add: AddCommand) -> None:
    """From ``fedzo mask`` to ``fedzo bench``."""
    usage = "fedzo mask [overrides] --out FILE [--config-dir DIR]"
    own = add("mask", mask, "choose the weights that trainer=meerkat trains, once for many runs", usage=usage)
    own.add_argument("--out", metavar="FILE", required=True, help="safetensors file to write; use as inputs.artifact")
    add_overrides(own)

    _add_sketch(add)
    add_rephrase(add)

    usage = "fedzo perplexity [overrides] --text FILE [--windows N] [--tokens N] [--config-dir DIR]"
    own = add("perplexity", perplexity, "perplexity of a model on a text", usage=usage)
    text = "a .txt file, or a table (.jsonl, .json, .csv, .tsv, .parquet) with a column text, whose texts are joined"
    own.add_argument("--text", metavar="FILE", required=True, help=text)
    own.add_argument("--windows", type=_POSITIVE, metavar="N", help="windows from the start (default: all)")
    own.add_argument("--tokens", type=_POSITIVE, metavar="N", default=512, help="tokens of a window (default: 512)")
    add_overrides(own)

    usage = "fedzo bench step [overrides] [--shape SHAPE] [--rows N] [--tokens N] [--repeats N] [--out FILE]"
    own = add("bench", bench, "time a step, and its forwards alone", usage=usage)
    own.add_argument("what", choices=("step",), help="what to measure")
    own.add_argument("--shape", metavar="SHAPE", help="random weights of a published shape, such as opt-1.3b")
    own.add_argument("--rows", type=_POSITIVE, default=16, help="rows of a batch (default: 16)")
    own.add_argument("--tokens", type=_POSITIVE, default=32, help="tokens of a row (default: 32)")
    own.add_argument("--repeats", type=_POSITIVE, default=15, help="timed repeats (default: 15)")
    own.add_argument("--out", metavar="FILE", help="also write the results as JSON")
    own.add_argument("--no-memory", action="store_true", help="do not measure peak memory, which needs more processes")
    own.add_argument("--peak-of", help=SUPPRESS)
    add_overrides(own)


def mask(arguments: Namespace) -> None:
    """``fedzo mask``."""
    config = load_config(arguments)
    from fedzo.commands.mask import make_mask

    print_json(make_mask(config, Path(arguments.out)))


def _add_sketch(add: AddCommand) -> None:
    usage = "fedzo sketch [overrides] --out DIR --calibration FILE [--bits B] [more options]"
    summary = "quantize a model to lookup tables and 2- to 4-bit codes, for trainer=tables"
    own = add("sketch", sketch, summary, usage=usage)
    own.add_argument("--out", metavar="DIR", help="new model folder; use as model=DIR")
    text = "text without labels: a .txt file, or a table with a column text"
    own.add_argument("--calibration", metavar="FILE", help=text)
    own.add_argument("--bits", type=int, metavar="B", help="bits of a code: 2, 3 or 4 (default: 4)")
    own.add_argument("--groups-per-row", type=_POSITIVE, metavar="G", help="tables a row (default: 1)")
    own.add_argument("--windows", type=_POSITIVE, metavar="N", help="most windows of text (default: 128)")
    own.add_argument("--tokens", type=_POSITIVE, metavar="N", help="tokens of a window (default: 512)")
    own.add_argument("--skip", action="append", metavar="NAME", help="suffix of layer names to keep dense; repeatable")
    own.add_argument(
        "--text", metavar="FILE", help="text for the perplexity before and after (default: the calibration)"
    )
    own.add_argument("--importance-power", type=float, metavar="P", help="weight of outliers in a table (default: 4)")
    own.add_argument(
        "--damping", type=float, metavar="SHARE", help="share added to a Hessian's diagonal (default: 0.1)"
    )
    layout = "codes in LeanQuant's layout (safetensors)"
    own.add_argument("--import", dest="import_from", metavar="FILE", help=f"build from the dense model and {layout}")
    own.add_argument(
        "--export", dest="export_to", metavar="FILE", help=f"write the sketch model=DIR as tables and {layout}"
    )
    add_overrides(own)


_SKETCH_SETTINGS = ("bits", "groups_per_row", "importance_power", "damping")
_SKETCH_REQUEST = ("windows", "tokens", "skip")


def sketch(arguments: Namespace) -> None:
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
    print_lines(make_sketch(config, request))


def perplexity(arguments: Namespace) -> None:
    """``fedzo perplexity``."""
    config = load_config(arguments, trains=False)
    from fedzo.commands.perplexity import measure_perplexity
    from fedzo.report.sinks import phase

    with phase("measuring perplexity", stderr=True) as advance:
        found = measure_perplexity(
            config,
            Path(arguments.text),
            num_tokens=arguments.tokens,
            num_windows=arguments.windows,
            on_window=advance,
        )
    print_json(found)


def bench(arguments: Namespace) -> None:
    """``fedzo bench step``."""
    from fedzo.cli.bench import step

    step(arguments)
