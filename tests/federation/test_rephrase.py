"""OAT-Rephrase from the command line to the run, by an endpoint on the loopback interface."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fedzo.cli import main
from fedzo.data.files import read_rows
from fedzo.errors import ConfigError
from fedzo.records.decode import decode_json
from fedzo.records.rephrase import Manifest


def verdict(text_a: str, text_b: str) -> dict[str, str]:
    """A judge that knows the texts of these tests: what matters is the number and the last word."""

    def meaning(text: str) -> tuple[list[str], list[str], bool]:
        words = re.findall(r"[a-z]+", text.casefold())
        marks = [word for word in words if word in KNOWN]
        return re.findall(r"\d+", text), marks, bool({"not", "isn"} & {*words})

    label = "negative" if any(word in text_b for word in ("bad", "dull", "poor", "weak")) else "positive"
    return {"verdict": "same" if meaning(text_a) == meaning(text_b) else "different", "predicted_label": label}


KNOWN = {"bad", "dull", "poor", "weak", "good", "bright", "rich", "strong"}


def text_of(prompt: str, name: str) -> str:
    return str(json.loads([line for line in prompt.splitlines() if line.startswith(f"{name}: ")][-1].split(": ", 1)[1]))


@dataclass
class Endpoint:
    """A real server; what its rewriter and judge say, a test may change."""

    rewrite: Callable[[str], str] = lambda text: text.replace(" is ", " looks ")
    judge: Callable[[str, str], dict[str, str]] = verdict
    calls: list[str] = field(default_factory=list)
    url: str = ""
    status: int = 200
    seconds: float = 0.0
    faults: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    """Status and body that a prompt with such words gets."""

    def settings(self, store: Path) -> list[str]:
        return [
            "rewriter=openai_compatible",
            f"rewriter.base_url={self.url}",
            "rewriter.model=tiny",
            f"rewriter.store={store}",
        ]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    served = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            served.calls.append(prompt)
            time.sleep(served.seconds)
            if "text B" in prompt:
                text = json.dumps(served.judge(text_of(prompt, "text A"), text_of(prompt, "text B")))
            else:
                text = served.rewrite(text_of(prompt, "text"))
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 50, "completion_tokens": 10}
            answer = json.dumps({"model": "/secret/model.gguf", "choices": [choice], "usage": usage}).encode()
            faults = (each for words, each in served.faults.items() if words in prompt)
            status, answer = next(faults, (served.status, answer))
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            """Nothing on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served.url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield served
        server.shutdown()
        thread.join()


@pytest.fixture
def rephrase(endpoint: Endpoint, data_dir: Path, tmp_path: Path) -> Callable[..., int]:
    """Call ``fedzo rephrase`` on the training rows."""

    def call(*words: str) -> int:
        data = ["--task", "sst2", "--data", str(data_dir / "train.jsonl")]
        return main(["rephrase", *words, *data, *endpoint.settings(tmp_path / "store")])

    return call


@pytest.fixture
def run(endpoint: Endpoint, tiny_model_dir: Path, data_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Call ``fedzo train preprocess=[oat_rephrase]``."""

    def call(name: str, *extra: str, code: int = 0) -> Path:
        folder = tmp_path / name
        settings = [
            f"model={tiny_model_dir}",
            "task=sst2",
            f"data.path={data_dir}",
            "partition=iid",
            "partition.holdout=0",
            "trainer=mezo",
            "fl.num_clients=4",
            "fl.rounds=2",
            "threads=1",
            "report=none",
            "preprocess=[oat_rephrase]",
            f"hydra.run.dir={folder}",
        ]
        assert main(["train", *settings, *endpoint.settings(tmp_path / "store"), *extra]) == code
        return folder

    return call


def rewritten(data_dir: Path) -> list[dict[str, Any]]:
    return [{**row, "text": row["text"].replace(" is ", " looks ")} for row in read_rows(data_dir / "train.jsonl")]


def test_from_the_judges_test_to_a_run(
    rephrase: Callable[..., int],
    run: Callable[..., Path],
    endpoint: Endpoint,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert rephrase() == 1
    assert "fedzo rephrase judge-test" in capsys.readouterr().err
    assert endpoint.calls == []

    assert rephrase("judge-test") == 0
    told = capsys.readouterr().out
    assert "sensitivity 100.0%" in told
    assert "the judge passes" in told

    before, out = len(endpoint.calls), tmp_path / "whole.jsonl"
    assert rephrase("--out", str(out)) == 0
    told = capsys.readouterr().out
    assert "64  rewritten" in told
    assert len(endpoint.calls) > before

    results = [*(tmp_path / "store" / "results").iterdir()]
    manifest = next(file for file in results if file.name.endswith(".manifest.json"))
    found: Manifest = decode_json(Manifest, manifest.read_text(), where="manifest", error=ConfigError)
    assert found.gate == "passed"
    assert found.calibration is not None
    assert found.counts == {"rewritten": 64}
    assert found.calls == len(endpoint.calls) - before
    page = next(file for file in results if file.suffix == ".html").read_text()
    assert "item 0 looks bad" in page
    assert [{**row} for row in read_rows(out)] == [{**row, "fedzo_status": "rewritten"} for row in rewritten(data_dir)]

    before = len(endpoint.calls)
    assert rephrase() == 0
    assert "no call was made" in capsys.readouterr().out
    folder = run("run")
    assert len(endpoint.calls) == before
    text = "".join(file.read_text() for file in folder.rglob("*.json*"))
    assert re.search(r'"oat_rephrase[^"]*rewritten": ?\d+', text)
    assert "looks" not in text
    assert "/secret/" not in text
    assert endpoint.url not in json.dumps(json.loads((folder / "config.json").read_text()).get("preprocess"))


def test_a_command_that_is_killed_ends_with_the_same_results_when_it_is_called_again(
    endpoint: Endpoint, data_dir: Path, tmp_path: Path
) -> None:
    """By SIGKILL, in the middle: the calls in flight are lost, and nothing else."""

    def command(store: str) -> list[str]:
        words = ["--task", "sst2", "--data", str(data_dir / "train.jsonl"), *endpoint.settings(tmp_path / store)]
        return ["rephrase", *words, "preprocess.oat_rephrase.gate=false"]

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    endpoint.seconds = 0.05
    real = [sys.executable, "-m", "fedzo", *command("killed")]
    with subprocess.Popen(real, env=environment, stdout=subprocess.DEVNULL) as killed:
        end = time.monotonic() + 120
        while len(endpoint.calls) < 80:
            assert killed.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        killed.kill()
    before = len(endpoint.calls)
    assert not (tmp_path / "killed" / "results").exists()

    endpoint.seconds = 0.0
    assert main(command("killed")) == 0
    assert 3 * 64 <= len(endpoint.calls) <= 3 * 64 + 4  # rewriter.concurrency
    assert before >= 80
    assert main(command("whole")) == 0

    (one,), (other,) = ([*(tmp_path / name / "results").glob("*.jsonl")] for name in ("killed", "whole"))
    assert one.name == other.name
    assert one.read_bytes() == other.read_bytes()


def test_a_run_trains_on_what_its_stages_made(
    run: Callable[..., Path], endpoint: Endpoint, data_dir: Path, tmp_path: Path
) -> None:
    """The oracle is a run without the stage on a folder whose training rows are the rewritten ones."""
    folder = run("staged", "preprocess.oat_rephrase.gate=false")
    assert len(endpoint.calls) == 3 * 64
    manifests = [file.read_text() for file in (tmp_path / "store" / "results").glob("*.manifest.json")]
    read = [decode_json(Manifest, text, where="manifest", error=ConfigError) for text in manifests]
    assert [each.gate for each in read] == ["overridden"] * 4  # one a client
    assert sum(each.calls for each in read) == len(endpoint.calls)

    other = tmp_path / "data"
    other.mkdir()
    (other / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rewritten(data_dir)))
    for name in ("dev", "test"):
        (other / f"{name}.jsonl").write_bytes((data_dir / f"{name}.jsonl").read_bytes())
    plain = run("plain", f"data.path={other}", "preprocess=[]")

    assert losses(folder) == losses(plain)
    assert losses(folder) != losses(run("original", "preprocess=[]"))


def losses(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line.get("kind") == "round"]


def test_held_out_rows_keep_their_text(run: Callable[..., Path], endpoint: Endpoint) -> None:
    run(
        "staged", "preprocess.oat_rephrase.gate=false", "partition.holdout=0.25", "preprocess.oat_rephrase.judged=false"
    )

    assert len(endpoint.calls) == 48


def test_a_resumed_run_finds_other_text_refused(
    run: Callable[..., Path], endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("staged", "preprocess.oat_rephrase.gate=false")
    result = next((tmp_path / "store" / "results").glob("*.jsonl"))
    kept = result.read_text()
    result.write_text(kept.replace("looks", "seems"))

    assert main(["resume", str(folder), "fl.rounds=3"]) != 0
    assert "other text" in capsys.readouterr().err

    result.write_text(kept)
    before = len(endpoint.calls)
    assert main(["resume", str(folder), "fl.rounds=3"]) == 0
    assert len(endpoint.calls) == before


def test_an_endpoint_that_fails_in_a_run_is_told_from_rows_that_cannot_be_read(
    run: Callable[..., Path], endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server hears a number; what the endpoint said stays in the site's own log, and the run can be made again."""
    run("ungated", code=2)
    told = capsys.readouterr().err
    assert "refusal 37, its site cannot rewrite the rows now" in told
    assert "refusal 1," not in told
    assert endpoint.calls == []

    endpoint.status = 500
    run("dead", "preprocess.oat_rephrase.gate=false", code=2)
    told = capsys.readouterr().err
    assert "refusal 37, its site cannot rewrite the rows now" in told
    assert not [*(tmp_path / "store" / "results").glob("*.jsonl")]

    endpoint.status = 200
    run("alive", "preprocess.oat_rephrase.gate=false")


def test_a_run_without_a_rewriter_says_which_key_to_set(
    run: Callable[..., Path], endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.settings = lambda store: []  # type: ignore[method-assign]
    run("staged", code=2)

    assert "rewriter=openai_compatible with rewriter.base_url" in capsys.readouterr().err


def test_a_judge_that_agrees_with_everything_stops_it(
    rephrase: Callable[..., int], endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.judge = lambda a, b: {"verdict": "same", "predicted_label": "positive"}

    assert rephrase("judge-test") == 1
    assert "specificity must be at least 95%, got 0%" in capsys.readouterr().err
    assert rephrase() == 1
    assert "the judge must pass its test" in capsys.readouterr().err
    assert rephrase("preprocess.oat_rephrase.gate=false") == 0


def test_a_rewriter_that_writes_the_label_is_caught(
    rephrase: Callable[..., int], endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.rewrite = lambda text: (
        f"{text.replace(' is ', ' looks ')} and "
        + ("negative" if any(word in text for word in ("bad", "dull", "poor", "weak")) else "positive")
    )

    assert rephrase("preprocess.oat_rephrase.gate=false") == 0

    assert "64  original leak" in capsys.readouterr().out


def test_a_dry_run_shows_prompts_and_makes_no_call(
    rephrase: Callable[..., int], endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rephrase("--dry-run", "2") == 0

    told = capsys.readouterr().out
    assert told.count('text: "item') == 2
    assert "64 rows, at most 192 calls" in told
    tokens = r"accepted at once, about [\d,]+ tokens of prompts and [\d,]+ of answers"
    assert re.search(tokens + r" \(no prices given: rewriter\.price_prompt", told)
    assert re.search(r"preprocess.oat_rephrase.prompt=[0-9a-f]{64}", told)
    prices = ("rewriter.price_answer=1e6", "rewriter.max_tokens=100", "preprocess.oat_rephrase.max_attempts=3")
    assert rephrase("--dry-run", "2", *prices) == 0
    told = capsys.readouterr().out
    assert "64 rows, at most 448 calls" in told  # 3 rewrites, a verdict on the original and 3 on rewrites each
    answers = 64 * (3 * 100 + 4 * 128)
    assert re.search(rf"at most [\d,]+ tokens of prompts and {answers:,} of answers \({answers}.00 by", told)
    assert endpoint.calls == []


def accept(table: Path, number: int, **changes: str) -> list[dict[str, str]]:
    """Say yes to a row of a table, as a person does in a spreadsheet; returns all rows."""
    with table.open(newline="") as file:
        rows = [*csv.DictReader(file)]
    rows[number] |= {"accept": "yes", **changes}
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def test_examples_come_back_from_the_table(
    rephrase: Callable[..., int], run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "examples.csv"
    assert rephrase("bootstrap", "--table", str(table)) == 0
    assert len(accept(table, 3, rewrite="The item 3 appears strong.")) == 40

    capsys.readouterr()
    assert rephrase("--dry-run", "1", f"rewriter.examples={table}") == 0
    told = capsys.readouterr().out
    assert "The item 3 appears strong." in told
    key = re.search(r"preprocess.oat_rephrase.prompt=[0-9a-f]{64}", told)
    assert key
    run("without", f"rewriter.examples={table}", "preprocess.oat_rephrase.gate=false", code=2)
    assert key[0].partition("=")[2] in capsys.readouterr().err
    run("with", f"rewriter.examples={table}", "preprocess.oat_rephrase.gate=false", key[0])

    assert rephrase("bootstrap", "--table", str(table)) == 2
    assert "must not exist" in capsys.readouterr().err


def test_the_table_has_rows_of_all_labels_however_the_data_are_sorted(endpoint: Endpoint, tmp_path: Path) -> None:
    data, table = tmp_path / "sorted.jsonl", tmp_path / "examples.csv"
    rows = [{"text": f"item {n} is {['bad', 'good'][n // 60]}", "label": n // 60} for n in range(120)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["bootstrap", "--table", str(table), "--task", "sst2", "--data", str(data)]

    assert main(["rephrase", *words, *endpoint.settings(tmp_path / "store")]) == 0

    with table.open(newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert len(labels) == 40
    assert 8 <= labels.count("1") <= 32


def test_rewrites_from_elsewhere_are_checked_and_found_by_a_run(
    rephrase: Callable[..., int],
    run: Callable[..., Path],
    endpoint: Endpoint,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sets = [{"row": number, "text": row["text"], "verdict": "same"} for number, row in enumerate(rewritten(data_dir))]
    sets[0]["text"] = "item 1000 looks bad"
    sets[1]["verdict"] = "not the same"
    sets[3]["verdict"] = None
    sets[2]["text"] += " to Bob"
    file = tmp_path / "sets.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in sets[:-1]))

    assert rephrase("import", str(file)) == 0

    told = capsys.readouterr().out
    assert "61  rewritten" in told
    assert "1  rewritten with a name lost or added (a warning)" in told
    (manifest,) = (tmp_path / "store" / "results").glob("*.manifest.json")
    assert decode_json(Manifest, manifest.read_text(), where="manifest", error=ConfigError).names == 1
    for reason in ("numbers", "verdict", "absent"):
        assert f"1  original {reason}" in told
    key = re.search(r"preprocess.oat_rephrase.imported=[0-9a-f]{64}", told)
    assert key
    run("imported", key[0])
    assert endpoint.calls == []
    run("not imported", f"preprocess.oat_rephrase.imported={'0' * 64}", code=2)
    assert "refusal 37, its site cannot rewrite the rows now, or lacks the prompts" in capsys.readouterr().err


def test_sets_that_were_imported_for_other_data_are_replaced_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 0 stands twice in the data, and once in the sets."""
    rows = [{"text": f"the film is {word}", "label": 0} for word in ("fine", "odd", "sad", "fine")]
    right, wrong, sets = tmp_path / "my dir,1", tmp_path / "wrong.jsonl", tmp_path / "sets.csv"
    right.mkdir()
    right = right / "rows (a)=b.jsonl"
    right.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong.write_text("".join(json.dumps(row) + "\n" for row in [rows[1], rows[0], *rows[2:]]))
    sets.write_text("row,text,verdict\n0,the movie is fine,\n1,the movie is odd,same\n2,the movie is sad,\n")

    def call(data: Path) -> str:
        words = ["import", str(sets), "--task", "sst2", "--data", str(data), f"rewriter.store={tmp_path / 'store'}"]
        assert main(["rephrase", *words]) == 0
        return capsys.readouterr().out

    call(wrong)
    told = call(right)

    assert "     4  rewritten" in told
    assert "2 rows had another result from these sets, for other data perhaps" in told
    assert "the results of before are kept: " in told
    assert "another result" not in call(right)
    (results,) = (each for each in (tmp_path / "store" / "results").glob("*.jsonl") if "older" not in each.name)
    texts = {json.loads(line)["text"] for line in results.read_text().splitlines()}
    assert texts == {"the movie is fine", "the movie is odd", "the movie is sad"}


def test_labels_by_name_are_those_of_the_rows(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, names = tmp_path / "named.jsonl", ("neg", "pos")
    data.write_text("".join(json.dumps({"text": f"item {n} is here", "label": names[n % 2]}) + "\n" for n in range(6)))
    endpoint.rewrite = lambda text: f"{text} positive indeed"
    words = ["--task", "sst2", "--data", str(data), "task.labels=[neg,pos]", "preprocess.oat_rephrase.judged=false"]

    assert main(["rephrase", *words, "preprocess.oat_rephrase.checks=[empty]", *endpoint.settings(tmp_path / "s")]) == 0

    assert "rewrites that leak an answer: the right one 3, a wrong one 3" in capsys.readouterr().out


def test_a_task_whose_answer_is_written_needs_no_further_key(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "squad.jsonl"
    rows = [{"context": f"Anna is {n} years old.", "question": "Who?", "answer": "Anna"} for n in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert (
        main(["rephrase", "--task", "squad", "--data", str(data), "--dry-run", "1", *endpoint.settings(tmp_path)]) == 0
    )

    assert "3 rows, at most 9 calls" in capsys.readouterr().out


def test_a_task_of_ones_own_is_rewritten_by_the_recipes_words(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset, data = tmp_path / "my_conf" / "task" / "verdict.yaml", tmp_path / "reviews.jsonl"
    preset.parent.mkdir(parents=True)
    task = {"name": "verdict", "template": "Review: {text}\nVerdict:", "candidates": [" poor", " fine"]}
    defaults = {"defaults": ["task_schema", "_self_"]}
    preset.write_text(json.dumps({**defaults, **task, "label": "stars", "labels": ["bad", "good"]}))
    rows = [{"text": f"item {n} is here", "stars": ("bad", "good")[n % 2], "notes": "secret"} for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["rephrase", "--config-dir", str(tmp_path / "my_conf"), "--task", "verdict", "--data", str(data)]
    about = 'preprocess.oat_rephrase.about="The task is to say whether a product is poor or fine."'
    words = [about, "preprocess.oat_rephrase.meanings=[poor,fine]", "preprocess.oat_rephrase.gate=false"]
    settings = endpoint.settings(tmp_path / "store")

    assert main([*command, "--dry-run", "1", *settings]) == 2
    assert "preprocess.oat_rephrase.about must say what the task 'verdict' is" in capsys.readouterr().err
    assert main([*command, "--dry-run", "2", *words, *settings]) == 0
    told = capsys.readouterr().out
    assert "4 rows, at most 12 calls" in told
    assert 'right answer: "fine"' in told
    assert "The task is to say whether a product is poor or fine." in told
    assert "secret" not in told
    assert endpoint.calls == []

    endpoint.judge = lambda a, b: {"verdict": "same", "predicted_label": "fine"}
    assert main([*command, *words, *settings]) == 0
    told = capsys.readouterr().out
    assert "4  rewritten" in told
    assert f"'{about}'" in told
    assert "secret" not in "".join(endpoint.calls)


def test_a_row_that_is_too_long_is_told_of_and_asked_for_where_there_is_room(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    texts = [f"item {n} is good" for n in range(6)] + ["item 6 is good" + " and here" * 2000]
    data.write_text("".join(json.dumps({"text": text, "label": 1}) + "\n" for text in texts))
    recipe = ["preprocess.oat_rephrase.gate=false", "preprocess.oat_rephrase.judged=false"]
    command = ["rephrase", "--task", "sst2", "--data", str(data), *recipe, *endpoint.settings(tmp_path / "store")]

    assert main([*command, "--dry-run", "1"]) == 0
    told = capsys.readouterr().out
    assert "7 rows, at most 6 calls" in told
    assert "without a call: 1 row (the prompt and its answer are longer than rewriter.context_tokens" in told
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "1  original too_long" in told
    assert "no room in the context: 1 row. Raise rewriter.context_tokens" in told
    assert "the endpoint failed" not in told
    assert len(endpoint.calls) == 6

    assert main([*command, "--again", "rewriter.context_tokens=20000"]) == 0
    assert len(endpoint.calls) == 7
    assert "7  rewritten" in capsys.readouterr().out


def test_text_of_rows_and_endpoint_is_data(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Markup, templates and control characters of either side reach neither a page as markup nor a terminal."""
    hostile = "<script>alert(1)</script> {{ 7 * 7 }} \x1b[2J \x9b2J is good"
    endpoint.rewrite = lambda text: text.replace(" is ", " looks ")
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"text": hostile, "label": 1}) + "\n")
    command = ["rephrase", "--task", "sst2", "--data", str(data), *endpoint.settings(tmp_path / "store")]

    assert main([*command, "--dry-run", "1"]) == 0
    assert main([*command, "preprocess.oat_rephrase.gate=false"]) == 0

    told = capsys.readouterr()
    assert not {"\x1b", "\x9b"} & {*told.out}
    assert "1  rewritten" in told.out
    page = next((tmp_path / "store" / "results").glob("*.html")).read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "{{ 7 * 7 }}" in page
    assert not {"\x1b", "\x9b"} & {*page}


@pytest.mark.parametrize(
    "words",
    [[], ["judge-test"], ["--dry-run", "1"], ["bootstrap", "--table", "table.csv"]],
    ids=lambda words: str(words),
)
@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            '{"text\\u001b[2J": "x", "label": 1}',
            "row 2 must have text in the column 'text', got a row with the columns",
        ),
        ('{"text": "half \\ud800", "label": 1}', "row 2 must have text in the column 'text', got half of a character"),
    ],
)
def test_a_row_that_does_not_fit_is_named_before_any_call(
    words: list[str],
    line: str,
    told: str,
    endpoint: Endpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "item 1 is good", "label": 1}\n' * 2 + line + "\n")
    gate = "preprocess.oat_rephrase.gate=false"
    command = ["--task", "sst2", "--data", str(data), gate, *endpoint.settings(tmp_path / "store")]

    assert main(["rephrase", *words, *command]) == 2

    found = capsys.readouterr()
    assert told in found.err
    assert "\x1b" not in found.err + found.out
    assert endpoint.calls == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["judge-test", "--dry-run", "2"], "--dry-run belongs to `fedzo rephrase` alone, got `judge-test`"),
        (["bootstrap", "--out", "o.jsonl"], "--out belongs to `fedzo rephrase` alone, got `bootstrap`"),
        (["--pairs", "5"], "--pairs belongs to `fedzo rephrase judge-test`, got neither"),
        (["--table", "t.csv"], "--table belongs to `fedzo rephrase bootstrap`, got neither"),
        (["--out", "{data}"], "--out must not be the file of --data"),
        (["--out", ""], "--out: the file must end in .jsonl"),
        (["--out", "none/o.jsonl"], "--out: the folder of none/o.jsonl must exist"),
        (["bootstrap", "--table", "none/t.csv"], "--table: the folder of none/t.csv must exist"),
        (["task.candidates=[A,B,C]"], "task.candidates must be answers that mean"),
        (["task.candidates=[Great,Bad]"], "answers that mean negative, positive, in this order"),
        (["preprocess.oat_rephrase.max_attempts=11"], "preprocess.oat_rephrase.max_attempts must be <= 10, got 11"),
        (["preprocess.oat_rephrase.column=label"], "column must be a column that the task reads (text), no label"),
        (["import", "gone.jsonl"], "gone.jsonl: there is no such file. Check the path."),
    ],
)
def test_options_that_cannot_be_meant_are_refused_before_any_call(
    words: list[str],
    told: str,
    rephrase: Callable[..., int],
    endpoint: Endpoint,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    file = data_dir / "train.jsonl"
    rows = file.read_bytes()

    assert rephrase(*(word.format(data=file) for word in words), "preprocess.oat_rephrase.gate=false") == 2

    assert told in capsys.readouterr().err
    assert endpoint.calls == []
    assert file.read_bytes() == rows


def test_a_file_that_is_not_its_own_is_never_replaced(
    rephrase: Callable[..., int], endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, recipe = tmp_path / "out.jsonl", "preprocess.oat_rephrase.gate=false"
    out.write_text('{"text": "another\'s", "label": 0}\n')
    assert rephrase("--out", str(out), recipe) == 2
    assert f"--out: {out} must not exist, or hold what fedzo rephrase wrote of these rows" in capsys.readouterr().err
    assert (out.read_text()[:20], endpoint.calls) == ('{"text": "another\'s"', [])

    out.unlink()
    assert [rephrase("--out", str(out), recipe) for _ in range(2)] == [0, 0]
    kept = out.read_text()
    out.write_text(kept.partition("\n")[2])  # of other data, by fedzo, too
    assert rephrase("--out", str(out), recipe) == 2
    assert out.read_text() == kept.partition("\n")[2]


def test_columns_of_values_that_json_lacks_are_text_in_the_whole_file_and_no_other_rows(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "rows.parquet", tmp_path / "out.jsonl"
    others = {"price": Decimal("1.50"), "raw": b"\xff", "score": math.nan}
    rows = [{"text": f"item {n} is good", "label": 1, "seen": date(2024, 5, n), **others} for n in (1, 2, 3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    recipe = ["preprocess.oat_rephrase.judged=false", *endpoint.settings(tmp_path / "store")]
    command = ["rephrase", "--task", "sst2", "--data", str(data), "--out", str(out), *recipe]

    assert main(command) == 0
    written = out.read_text()
    assert main([*command, "--again"]) == 0

    assert out.read_text() == written
    read = [json.loads(line) for line in written.splitlines()]
    assert [row.pop("score") for row in read] == [pytest.approx(math.nan, nan_ok=True)] * 3
    plain = {"label": 1, "price": "1.50", "raw": "b'\\xff'", "fedzo_status": "rewritten"}
    assert read == [{"text": f"item {n} looks good", "seen": f"2024-05-0{n}", **plain} for n in (1, 2, 3)]

    out.write_text(written.replace("2024-05-02", "2024-05-09"))
    assert main(command) == 2
    assert "got other rows" in capsys.readouterr().err


def test_what_the_endpoint_says_is_shown(
    rephrase: Callable[..., int], endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.faults = {"item 5 ": (400, b'{"error": {"message": "too long \\u001b[2J"}}')}

    assert rephrase("preprocess.oat_rephrase.gate=false") == 0

    told = capsys.readouterr().out
    assert 'a call failed: refused: 400 "too long  [2J"' in told
    assert "by the prices" not in told
    assert re.search(r"^\d+ calls, [\d,]+ tokens$", told, re.MULTILINE)


def test_a_text_that_a_provider_does_not_allow_is_named_by_its_row(
    rephrase: Callable[..., int], endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.faults = {"item 5 ": (403, b'{"error": {"message": "your input was flagged"}}')}

    assert rephrase("preprocess.oat_rephrase.gate=false") == 1

    told = capsys.readouterr().err
    assert 'answered 403 "your input was flagged"' in told
    assert "leave row 5 out of the data" in told


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("preprocess=[]", "preprocess must hold oat_rephrase, as fedzo rephrase itself writes. Leave the key out."),
        ("rewriter.store=/proc/none", "rewriter.store: it must be possible to write in /proc/none, got: "),
    ],
)
def test_settings_that_leave_nothing_to_do_or_to_write_in_are_named(
    word: str, told: str, endpoint: Endpoint, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--task", "sst2", "--data", str(data_dir / "train.jsonl")]

    code = main(["rephrase", *data, *endpoint.settings(tmp_path / "s"), word])

    assert (code, endpoint.calls) == (2, [])
    assert told in capsys.readouterr().err


def test_pages_with_text_of_clients_are_for_their_owner_and_keep_what_was_refused(
    rephrase: Callable[..., int], endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.rewrite = lambda text: "a rewrite that no check lets pass: 12345"
    recipe = ["preprocess.oat_rephrase.gate=false", 'preprocess.oat_rephrase.checks=["empty","numbers"]']
    assert rephrase(*recipe) == 0
    (page,) = (tmp_path / "store" / "results").glob("*.html")
    first, calls = page.read_text(), len(endpoint.calls)
    key = re.search(r"'(preprocess.oat_rephrase.checks=[^']*)'", capsys.readouterr().out)

    assert rephrase(*recipe) == 0

    assert "12345" in first
    assert page.read_text() == first
    assert len(endpoint.calls) == calls
    assert page.stat().st_mode & 0o777 == 0o600
    assert key
    assert key[1] == recipe[1]


def test_rows_that_the_endpoint_failed_are_asked_for_again_where_one_says_so(
    rephrase: Callable[..., int], endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = endpoint.rewrite
    endpoint.rewrite = lambda text: "" if text.startswith("item 3 ") else own(text)
    assert rephrase("preprocess.oat_rephrase.gate=false") == 0
    assert "the endpoint failed 1 row: --again retries them" in capsys.readouterr().out
    calls, endpoint.rewrite = len(endpoint.calls), own

    assert rephrase("preprocess.oat_rephrase.gate=false") == 0
    assert len(endpoint.calls) == calls

    assert rephrase("preprocess.oat_rephrase.gate=false", "--again") == 0
    assert len(endpoint.calls) > calls
    told = capsys.readouterr().out
    assert told.count("the endpoint failed") == 1  # of the second call
    older = re.search(r"the results of before are kept: (.*\.older-0001\.jsonl)\. ", told)
    assert older
    assert sum('"reason":"empty"' in line for line in Path(older[1]).read_text().splitlines()) == 1
    assert rephrase("preprocess.oat_rephrase.gate=false", "--again") == 0  # nothing is left to ask
    assert "results of before" not in capsys.readouterr().out


def test_no_cell_of_a_table_is_a_formula_and_text_comes_back_as_it_was(
    rephrase: Callable[..., int], endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, formula = tmp_path / "examples.csv", '=HYPERLINK("http://there","item")'
    endpoint.rewrite = lambda text: formula
    assert rephrase("bootstrap", "--table", str(table)) == 0
    assert {row["rewrite"] for row in accept(table, 0)} == {"'" + formula}
    capsys.readouterr()

    assert rephrase("--dry-run", "1", f"rewriter.examples={table}") == 0

    told = capsys.readouterr().out
    assert "=HYPERLINK" in told
    assert "'=HYPERLINK" not in told


def test_a_sites_file_names_the_rewriter_and_keeps_the_results_beside_it(
    endpoint: Endpoint, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    settings = {"plugin": "openai_compatible", "base_url": endpoint.url, "model": "tiny", "concurrency": 2}
    (site / "site.yaml").write_text(json.dumps({"rewriter": settings}))
    monkeypatch.chdir(tmp_path)
    data = ["--task", "sst2", "--data", str(data_dir / "train.jsonl"), "--site", str(site / "site.yaml")]

    assert main(["rephrase", *data, "preprocess.oat_rephrase.gate=false"]) == 0

    assert [*(site / "rephrase" / "results").glob("*.jsonl")]
    assert not (tmp_path / "rephrase").exists()


def test_marked_rows_are_not_scored(
    run: Callable[..., Path], data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marked = tmp_path / "marked.jsonl"
    marked.write_text("".join(json.dumps({**row, "fedzo_status": "rewritten"}) + "\n" for row in rewritten(data_dir)))

    run("drawn", f"data.path={marked}", "preprocess=[]", code=2)
    assert "must hold original text" in capsys.readouterr().err

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(marked.read_bytes())
    for name in ("dev", "test"):
        (folder / f"{name}.jsonl").write_bytes((data_dir / f"{name}.jsonl").read_bytes())
    run("heldout", f"data.path={folder}", "preprocess=[]", "partition.holdout=0.25", code=2)
    run("trained", f"data.path={folder}", "preprocess=[]")
