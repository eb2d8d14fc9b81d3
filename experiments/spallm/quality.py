"""What a sketch loses: ``python experiments/spallm/quality.py --data DIR``, about four minutes a sketch on two cores.

SmolLM2-135M is sketched in several ways on C4 text, and its perplexity on WikiText-2 is measured on the same 16 windows
of 512 tokens as the dense model's. Beside it: round to nearest on a uniform grid, and NF4 of bitsandbytes. Each result
is kept in ``quality.json``, so a repeated call goes on. ``--data`` is a folder with ``c4/train.jsonl`` and
``wikitext2/test.jsonl``. The embedded model comes from a Q4_1 file of 5 bits a weight: its sketch approximates an
approximation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from fedzo.bench.claims import Claims, check_alike, kept_results, measured_in
from fedzo.data.files import read_running_text
from fedzo.evaluate.perplexity import perplexity, text_windows
from fedzo.models.config import ModelConfig
from fedzo.models.load import load_model, wrap_model
from fedzo.models.loaded import LoadedModel
from fedzo.models.sketched.builder import layers_to_sketch, sketch_model
from fedzo.models.source import read_model
from fedzo.records.folder import replace_file
from fedzo.sketch import SketchSettings, sketched_layers
from fedzo.system import environment, use_threads

HERE = Path(__file__).parent
EMBEDDED = "SmolLM2-135M (itself from a Q4_1 file, 5 bits a weight)"
RESULTS = HERE / "quality.json"
COMMAND = "python experiments/spallm/quality.py --data DIR"
TOKENS, WINDOWS = 512, 16
SETTINGS = {"tokens": TOKENS, "windows": WINDOWS}
Result = dict[str, Any]


def sketched(windows: int = 16, *, sequential: bool = True, **settings: Any) -> Callable[[Path], Result]:
    """A measurement of the model, sketched with so many windows of C4."""

    def measure(data: Path) -> Result:
        loaded = load_model(ModelConfig())
        text = windows_of(loaded, data / "c4" / "train.jsonl")[:windows]
        started = time.process_time()
        with tempfile.TemporaryDirectory() as kept:
            report = sketch_model(
                loaded.model, list(text), SketchSettings(**settings), sequential=sequential, kept=Path(kept) / "layers"
            )
        layers = sketched_layers(loaded.model).values()
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        bits = sum(8 * layer.codes.numel() + 16 * layer.tables.numel() for layer in layers) / weights
        return {
            "perplexity": on_wikitext(loaded, data),
            "bits": bits,
            "layer_error": sum(each.relative_error for each in report.layers.values()) / len(report.layers),
            "build_cpu_s": time.process_time() - started,
            "forwards_s": report.forwards_s,
            "matrices_s": report.matrices_s,
        }

    return measure


def dense(data: Path) -> Result:
    """The model as it is."""
    return {"perplexity": on_wikitext(load_model(ModelConfig()), data), "bits": 16.0}


def uniform(bits: int, group: int) -> Callable[[Path], Result]:
    """Round to nearest on a uniform grid between the least and largest weight of each group, with float16 ends."""

    def measure(data: Path) -> Result:
        loaded = load_model(ModelConfig())
        with torch.no_grad():
            for name in layers_to_sketch(loaded.model, 1, []):
                weight: Any = loaded.model.get_submodule(name).weight
                parts = weight.view(-1, group)
                low, high = (each.half().float() for each in parts.aminmax(dim=1, keepdim=True))
                step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
                parts.copy_(((parts - low) / step).round().clamp(0, 2**bits - 1) * step + low)
        return {"perplexity": on_wikitext(loaded, data), "bits": bits + 32 / group}

    return measure


def nf4(data: Path) -> Result:
    """bitsandbytes' NF4 in blocks of 64 weights, each with a float32 scale."""
    with tempfile.TemporaryDirectory() as folder:
        plain = load_model(ModelConfig())
        model: Any = plain.model
        model.save_pretrained(folder)
        plain.tokenizer.save_pretrained(folder)
        packing: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")  # type: ignore[no-untyped-call]
        model = read_model(folder, quantization_config=packing, dtype=torch.float32, device_map={"": "cpu"})
        return {"perplexity": on_wikitext(wrap_model(model, plain.tokenizer), data), "bits": 4.5}


CELLS: dict[str, Callable[[Path], Result]] = {
    "dense": dense,
    "4 bits": sketched(),
    "3 bits": sketched(bits=3),
    "3 bits, unweighted tables": sketched(bits=3, importance_power=0.0),
    "3 bits, unweighted tables, nearest codes": sketched(bits=3, importance_power=0.0, compensate=False),
    "NF4, blocks of 64": nf4,
    "uniform 4 bits, groups of 64": uniform(4, 64),
    "uniform 3 bits, groups of 64": uniform(3, 64),
    "4 bits, all 128 windows": sketched(128),
    "4 bits, unweighted tables": sketched(importance_power=0.0),
    "4 bits, Hessians of the dense model": sketched(sequential=False),
    "3 bits, Hessians of the dense model": sketched(bits=3, sequential=False),
    "2 bits": sketched(bits=2),
    "4 bits, 2 groups": sketched(groups_per_row=2),
    "4 bits, 4 groups": sketched(groups_per_row=4),
    "4 bits, 8 groups": sketched(groups_per_row=8),
    "3 bits, 4 groups": sketched(bits=3, groups_per_row=4),
    "2 bits, 4 groups": sketched(bits=2, groups_per_row=4),
    "4 bits, p = 2": sketched(importance_power=2.0),
    "4 bits, p = 3": sketched(importance_power=3.0),
    "3 bits, p = 2": sketched(bits=3, importance_power=2.0),
    "3 bits, p = 3": sketched(bits=3, importance_power=3.0),
}


def windows_of(loaded: LoadedModel, file: Path) -> torch.Tensor:
    """The windows of a text."""
    return text_windows(loaded, read_running_text(file), num_tokens=TOKENS, source=str(file))


def on_wikitext(loaded: LoadedModel, data: Path) -> float:
    """Perplexity on the first 16 windows of WikiText-2's test text."""
    return perplexity(loaded, windows_of(loaded, data / "wikitext2" / "test.jsonl")[:WINDOWS]).value


def write_claims(results: dict[str, Result]) -> None:
    """Rows of the results that are there."""
    claims = Claims(command=COMMAND, environment=measured_in(results.values()))
    base = results["dense"]["perplexity"]
    values = {name: result["perplexity"] for name, result in results.items()}
    bounds = {"4 bits": 1.10, "4 bits, all 128 windows": 1.10, "3 bits": 1.70}
    for name, result in results.items():
        what = f"{EMBEDDED} on WikiText-2, 16 windows of 512 tokens: {name}"
        claims.add(f"{what}, perplexity", result["perplexity"], "")
        if name != "dense":
            claims.add(f"{what}, perplexity over dense", result["perplexity"] / base, "", at_most=bounds.get(name))
            claims.add(f"{what}, bits a weight", result["bits"], "bits")
        if "layer_error" in result:
            claims.add(f"{what}, relative error of the layers' outputs", result["layer_error"], "")
    for better, worse in ordered():
        if better in values and worse in values:
            claims.add(
                f"{EMBEDDED}: perplexity of {better}, over {worse}", values[better] / values[worse], "", at_most=1
            )
    nearest = "3 bits, unweighted tables, nearest codes"
    if {"3 bits, unweighted tables", nearest} <= values.keys():
        ratio = values["3 bits, unweighted tables"] / values[nearest]
        claims.add(f"{EMBEDDED}: perplexity of 3 bits, unweighted tables, over {nearest}", ratio, "", at_most=0.2)
    claims.write(HERE / "claims.json")


def ordered() -> Iterator[tuple[str, str]]:
    """Pairs of which the first should have the lower perplexity."""
    yield "3 bits", "3 bits, unweighted tables"
    yield "4 bits", "4 bits, unweighted tables"
    yield "4 bits", "NF4, blocks of 64"
    yield "4 bits", "uniform 4 bits, groups of 64"
    yield "3 bits", "uniform 3 bits, groups of 64"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with c4 and wikitext2")
    parser.add_argument("--only", action="append", choices=CELLS, help="measure this one; repeatable (default: all)")
    parser.add_argument("--threads", type=int, default=0, help="of this process (default: as many as fit)")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    results: dict[str, Result] = kept_results(RESULTS, {})
    check_alike([*results.values(), {"environment": {"settings": SETTINGS}}])
    for name in ["dense", *(arguments.only or CELLS)]:
        if name not in results:
            results[name] = CELLS[name](arguments.data) | {"environment": {**environment(), "settings": SETTINGS}}
            replace_file(RESULTS, json.dumps(results, indent=2) + "\n")
            write_claims(results)
        print(f"{name}: {results[name]['perplexity']:.2f}", flush=True)


if __name__ == "__main__":
    main()
