"""Sites of one run with models of different dtypes, on different devices: every site comes to one hash.

By the log, but for a mask over weights that were stored wider than a site holds them: its base is rounded, and the
server sends it the values once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message

from fedzo.commands.replay import replay_run
from fedzo.commands.run_folder import read_launch, read_run
from fedzo.models.config import DType
from fedzo.run import apps
from fedzo.run.client_context import ClientContext
from fedzo.run.process import Process, open_process, this_process
from fedzo.runtime import inline

Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def mixed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, ClientContext]:
    """Odd clients are played by a site of their own, which holds the model in bfloat16 on a device of its own."""
    sites: dict[int, ClientContext] = {}

    def site(number: int, run_dir: Path, run_json: str) -> ClientContext:
        if number not in sites:
            process: Process = this_process(run_json)
            if number:
                launch = read_launch(run_dir).site()
                own = replace(launch, device=request.param, model=replace(launch.model, dtype=DType.bfloat16))
                process = open_process(
                    read_run(run_dir), own, artifacts=run_dir / "artifacts", site_folder=tmp_path, plays_clients=True
                )
            sites[number] = process.client
        return sites[number]

    def run_inline(server_app: Any, client_app: Any, *, run_config: dict[str, str], **settings: Any) -> None:
        def played(message: Message, context: Context) -> Message:
            number = (context.node_id - inline.FIRST_NODE_ID) % 2
            worker = site(number, Path(run_config["run-dir"]), run_config["config"]).worker
            monkeypatch.setattr(apps, "_worker", lambda _: worker)
            return apps.client_app(message=message, context=context)

        original(server_app, played, run_config=run_config, **settings)

    original = inline.run_inline
    monkeypatch.setattr(inline, "run_inline", run_inline)
    return sites


@pytest.mark.parametrize("trainer", ["meerkat", "lora", "tables"])
def test_float32_and_bfloat16_sites_of_one_run_reach_the_same_hash(
    run: Run, lines: Lines, mixed: dict[int, ClientContext], trainer: str
) -> None:
    folder = run(f"trainer={trainer}", "model.dtype=float32", "fl.rounds=4", "fl.hash_every=1", "fl.local_steps=2")

    held = [site.peer.loaded.model.get_input_embeddings().weight.dtype for _, site in sorted(mixed.items())]
    assert held == [torch.float32, torch.bfloat16]
    rounds = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "round"]
    assert [line["absent"] for line in rounds] == [[]] * 4  # every site came to the server's SHA-256 in every round
    assert replay_run(folder)["digest"] == lines(folder, "public.jsonl")[-1]["digest"]
