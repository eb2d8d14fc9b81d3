"""Does rewritten training text help zeroth-order training? OAT-Rephrase (arXiv 2506.17264) on SmolLM2-135M.

    python experiments/oat_rephrase/effect.py --data DATA --rewrites REWRITES

DATA has ``copa/test.jsonl``, ``cb/test.jsonl`` and ``c4/train.jsonl``. REWRITES has ``copa`` and ``cb`` with the
published rewrites of OAT's first author, which have no licence: their text is in a temporary folder while a run lasts.
Each result is a cell of ``effect.json``, so a repeated call goes on after any end. ``--show`` prints what is there and
runs nothing. A comparison is a claim once all of its cells are there. The claim says so where a rate that was chosen
lies at the edge of its grid, or leaves the dev loss not below the untrained model's: from such a comparison nothing
follows. This rule came after the runs.

What is fixed before any run:

- Sets: the original; OAT's main set and, for COPA, every fourth of its 20 further draws by name (the arm ``oat``);
  ``prompt2``, the nearest to a plain paraphrase; ``rule``, an edit that no model made (order of clauses, contractions,
  a frame around a single sentence). A rewrite whose published verdict is not ``same`` is left out for the original.
  ``--local FILE`` adds rewrites of a local model behind fedzo's checks, a lower bound of what rewriting does: those of
  ``fedzo rephrase`` with the embedded model behind llama.cpp's server, ``preprocess.oat_rephrase.style=plain`` and
  ``preprocess.oat_rephrase.gate=false``. CB has other text in 24 of 150 rows so. On COPA the command stopped, as over
  a fifth of the answers did not come to an end. With ``rewriter.examples=examples/copa.csv``, which we wrote, and
  ``rewriter.max_tokens=64`` COPA has other text in 94 of 300 rows. This was changed after the runs of the other arms
  and before any of this one's. The server's version may change these numbers.
  ``--set NAME=FILE`` adds an arm. FILE is what ``fedzo rephrase --out`` writes, of the rows of either task.
- Rows: ``train.jsonl`` of REWRITES is trained on (COPA 300, CB 150), its ``dev.jsonl`` (100) chooses learning rates,
  and ``test.jsonl`` of DATA (100 and 56) gives every figure. Dev and test are original text.
- Training: one client, plain SGD, two-point probes, batches of 4 rows, 170 steps (COPA) or 110 (CB), trained on the
  loss over candidates. ``mezo`` trains all weights, ``meerkat`` one in a thousand, by a mask on C4. The last step's
  model is scored, so no checkpoint is chosen.
- Learning rate, one rule for every arm: of 4e-6, 1.6e-5 and 6.4e-5 (mezo) or 1e-4, 4e-4 and 1.6e-3 (meerkat) that of
  the least dev loss after training at run seed 100. The draws of ``oat`` share the rate that is found on the main set.
- Runs: COPA seeds 0 to 5, CB seeds 0 to 3. Arms share a seed's directions and the order of its rows. Seed s of ``oat``
  trains on draw s (CB has one draw), so that a seed and its draw are one random effect.
- Primary outcome: the candidate loss of a test row less that of the original arm on the same row and seed. Runs (seed
  and draw) and rows are crossed random effects (``analysis.crossed_effect``). Accuracy is reported, not judged by.
  ``oat`` is compared with ``prompt2`` in the same way, since a plain paraphrase may do as much.
- Second: ``<G_train, G_dev>^2 / (E|G_batch|^2 |G_dev|^2)`` of the base model, relative to the original, by
  backpropagation of the same loss: batches of 10 rows in their order, ``G_dev`` on dev and test rows together.
- Cost by CPU time of single steps on a busy 2-core machine: a row costs 0.16 s forward and 0.6 s with its gradient
  (COPA), 0.4 and 1.4 s (CB). A step takes 2.6 s and 4.1 s with mezo, 1.3 s and 2.8 s with meerkat; opening a run 10 s.
  COPA: 45 runs of 480 s (mezo) and 45 of 270 s; CB: 28 of 520 s and 28 of 380 s; gradients 2,900 s. In all 62,000 s
  with ``--local``: 8.6 hours of 2 cores, in two processes of one thread each (``OMP_NUM_THREADS=1``), which take 8.9
  and 8.1 hours: ``--only copa-mezo --only cb-meerkat`` and ``--only gradient --only copa-meerkat --only cb-mezo``.

The same with a strong model behind an endpoint, as arms ``model-oat`` and ``model-plain``, both through fedzo's checks
and the judge's test (the words are those of ``fedzo rephrase`` for the endpoint):

    python experiments/oat_rephrase/effect.py --data DATA --rewrites REWRITES \
        --endpoint rewriter=openai_compatible rewriter.base_url=URL rewriter.model=MODEL
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

from arms import TASKS, TrainSet, changed, train_sets
from cells import METHODS, SEEDS, Cells, Place, base_losses, gradients, train
from findings import report

from fedzo.bench.claims import check_alike
from fedzo.cli import main as fedzo

HERE = Path(__file__).parent
WORK = Path("runs/oat_rephrase")
PARTS = ["gradient", *(f"{task}-{method}" for task in TASKS for method in METHODS)]


def rephrase(words: list[str], rewrites: Path) -> list[tuple[str, Path]]:
    """Rewrites of an endpoint in both styles, by ``fedzo rephrase``; a file of its models is not made again.

    The judge is tested on each task's rows first: without that ``fedzo rephrase`` stops at the gate.
    """
    files, models = [], _models(words)
    words = [f"rewriter.store={WORK / f'store-{models}'}", *words]  # results are found by recipe and row, not by model
    for task in TASKS:
        data = ["--task", task, "--data", str(rewrites / task / "train.jsonl")]
        of_task = {style: WORK / f"model-{style}-{task}-{models}.jsonl" for style in ("oat", "plain")}
        missing = {style: file for style, file in of_task.items() if not file.exists()}
        if missing and "preprocess.oat_rephrase.gate=false" not in words:
            _fedzo(["rephrase", "judge-test", *data, *words])
        for style, file in missing.items():
            _fedzo(["rephrase", *data, f"preprocess.oat_rephrase.style={style}", *words, "--out", str(file)])
        files += [(f"model-{style}", file) for style, file in of_task.items()]
    return files


def _models(words: list[str]) -> str:
    """Name of who rewrites and who judges, as a part of a file's name."""
    named = dict(word.split("=", 1) for word in words if "=" in word)
    rewriter = named.get("rewriter.model", "")
    if not rewriter:
        sys.exit("--endpoint: the words must name rewriter.model, got none. Add rewriter.model=MODEL.")
    both = [rewriter, named.get("rewriter.judge_model") or rewriter]
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(rewriter).name)[:60]
    return f"{readable}-{hashlib.sha256(json.dumps(both).encode()).hexdigest()[:8]}"


def _fedzo(command: list[str]) -> None:
    if fedzo(command) != 0:
        sys.exit(f"fedzo {' '.join(command[:2])} must succeed, but did not. Its message stands above.")


def named(text: str) -> tuple[str, Path]:
    """NAME=FILE."""
    name, equals, file = text.partition("=")
    if not equals or not name or name in ("original", "oat"):
        raise argparse.ArgumentTypeError(f"must be NAME=FILE with a new NAME, got {text!r}")
    return name, Path(file)


def run(cells: Cells, place: Place, sets: dict[str, list[TrainSet]], parts: list[str]) -> None:
    """Everything of these parts that is missing, in the order of the plan: gradients, then arm by arm."""
    if "gradient" in parts:
        for task, of_task in sets.items():
            gradients(cells, place, task, of_task)
    for arm in dict.fromkeys(each.arm for of_task in sets.values() for each in of_task):
        for task, of_task in sets.items():
            of_arm = [each for each in of_task if each.arm == arm]
            for method in METHODS:
                if of_arm and f"{task}-{method}" in parts:
                    base_losses(cells, place, task)
                    train(cells, place, task, method, of_arm, seeds=SEEDS[task])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with copa, cb and c4")
    parser.add_argument("--rewrites", type=Path, required=True, help="folder of the published rewrites")
    parser.add_argument("--local", type=Path, action="append", default=[], metavar="FILE", help="a local model's rows")
    parser.add_argument("--set", type=named, action="append", default=[], metavar="NAME=FILE", help="a further arm")
    parser.add_argument("--endpoint", nargs="+", default=[], metavar="WORD", help="rewrite by this endpoint first")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="what computes (default: cpu)")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; repeatable (default: all)")
    parser.add_argument("--show", action="store_true", help="run nothing")
    flags = parser.parse_args()
    files = [*(("local", file) for file in flags.local), *flags.set]
    WORK.mkdir(parents=True, exist_ok=True)
    if flags.endpoint:
        files += rephrase(flags.endpoint, flags.rewrites)
    cells = Cells(HERE / "effect.json", flags.device)
    sets = {task: train_sets(flags.rewrites, task, files) for task in TASKS}
    for task, of_task in sets.items():
        for each in of_task[1:]:
            count = changed(of_task[0].rows, each.rows)
            print(f"{task}, {each.name}: {count} of {len(each.rows)} rows are other text", flush=True)
    if not flags.show:
        check_alike([*cells.all().values(), {"environment": {"settings": cells.settings}}])
        run(cells, Place(flags.data, flags.rewrites, WORK, flags.device), sets, flags.only or PARTS)
    report(cells, sets, HERE / "claims.json")
    print(json.dumps({"cells": len(cells.all())}))


if __name__ == "__main__":
    main()
