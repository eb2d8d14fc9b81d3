"""Estimates of memory and time."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    FalconH1Config,
    GPT2Config,
    GraniteMoeHybridConfig,
    JambaConfig,
    LlamaConfig,
    NemotronHConfig,
    OPTConfig,
    PreTrainedConfig,
)
from transformers.activations import (
    FastGELUActivation,
    GELUActivation,
    NewGELUActivation,
    ReLUSquaredActivation,
    SiLUActivation,
)
from transformers.models.bloom.modeling_bloom import BloomGelu

from fedzo.data.config import Loss
from fedzo.data.encode import Example
from fedzo.errors import ConfigError
from fedzo.fl.replica import Replica, Workspace
from fedzo.masks.eligible import eligible_parameters
from fedzo.masks.sensitivity import WindowGradients, next_token_loss
from fedzo.models import memory
from fedzo.models.captured import capture
from fedzo.models.forwards import Planning
from fedzo.models.head import hidden_at
from fedzo.models.load import wrap_model
from fedzo.models.loaded import LoadedModel
from fedzo.models.memory import (
    ForwardSeconds,
    calibration_window_bytes,
    fit_tokens_per_batch,
    gradient_bytes,
    most_tokens,
    num_weights,
    scratch_bytes,
    server_optimizer_bytes,
    step_memory,
    time_forwards,
    weights_bytes,
)
from fedzo.models.scoring import example_losses
from fedzo.records.metrics import Estimate
from fedzo.run import costs
from fedzo.sketch import tables_of
from fedzo.system import is_out_of_memory
from fedzo.testing.tiny_models import (
    FAMILIES,
    WITHOUT_ATTENTION,
    byte_tokenizer,
    tiny_loaded,
    tiny_model,
    tiny_model_from,
    tiny_sketch,
    tiny_tokens,
)
from fedzo.testing.vector_space import VectorSpace
from fedzo.trainers.tables import TablesConfig
from fedzo.zo.directions import SHARED
from fedzo.zo.keys import OWN
from fedzo.zo.log import ScalarRecord
from fedzo.zo.server_optimizer import (
    SERVER_OPTIMIZERS,
    AdamConfig,
    FedDynConfig,
    MomentumConfig,
    ScaffoldConfig,
    ServerOptimizerConfig,
    SgdConfig,
)
from fedzo.zo.spaces.base import Space
from fedzo.zo.spaces.dense import DenseSpace
from fedzo.zo.spaces.full import FullSpace
from fedzo.zo.spaces.masked import MaskedSpace

_SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 512}
_SHAPE |= {"num_key_value_heads": 2}
_SCAN: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 64}
_BOTH = ["linear_attention", "full_attention"]
HYBRIDS: dict[str, Callable[[], PreTrainedConfig]] = {
    "falcon h1": lambda: FalconH1Config(**_SHAPE, **_SCAN, num_hidden_layers=2, mamba_d_ssm=64),
    "granite": lambda: GraniteMoeHybridConfig(
        **_SHAPE, **_SCAN, num_hidden_layers=2, layer_types=_BOTH, num_local_experts=0, num_experts_per_tok=1
    ),
    "nemotron h": lambda: NemotronHConfig(
        **_SHAPE,
        layers_block_type=_BOTH,
        head_dim=8,
        num_experts_per_tok=1,
        n_groups=1,
        ssm_state_size=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        chunk_size=64,
    ),
    "jamba": lambda: JambaConfig(
        **_SHAPE,
        num_hidden_layers=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        num_experts_per_tok=1,
        mamba_d_state=16,
    ),
}
"""With state space layers of 64 channels, in 4 heads and chunks of 64 tokens but for Jamba, beside attention."""


@pytest.mark.parametrize(
    ("error", "whether"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx(handle)`"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
        (torch.OutOfMemoryError("cuModuleLoadData failed: CUDA_ERROR_OUT_OF_MEMORY"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_is_short(error: Exception, whether: bool) -> None:
    assert is_out_of_memory(error) is whether


def test_an_error_that_was_raised_for_want_of_memory_says_so() -> None:
    """A site tells its server that memory is short, whether a round or the load of its model met it."""
    error = ConfigError("the memory of cpu must hold the weights")
    error.__cause__ = MemoryError()

    assert is_out_of_memory(error)
    assert not is_out_of_memory(ConfigError("out of memory"))


def test_tied_weights_count_once() -> None:
    assert weights_bytes(tiny_model("llama")) == 34_976 * 4
    assert weights_bytes(tiny_model("llama", dtype=torch.bfloat16)) == 34_976 * 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_a_sketch_has_the_weights_of_its_dense_model(family: str) -> None:
    dense = tiny_model(family)

    assert num_weights(tiny_sketch(family)) == num_weights(dense) == sum(each.numel() for each in dense.parameters())


def test_weights_that_share_a_byte_count_one_by_one() -> None:
    layer: Any = torch.nn.Linear(64, 3)
    packed: Any = torch.nn.Parameter(torch.zeros(96, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(shape=torch.Size([3, 64]))  # as bitsandbytes keeps it
    layer.weight = packed

    assert num_weights(layer) == 3 * 64 + 3


def step_bytes(model: Any, **settings: Any) -> int:
    return sum(step_memory(model, **settings))


def test_the_formula_by_hand() -> None:
    model = tiny_model("llama")
    weights, activations = 34_976 * 4, 100 * 4 * (6 * 32 + 3 * 64)

    def estimated(space: Space, *, local_steps: int = 1, head_rows: int = 0) -> int:
        trained = space.step_bytes(local_steps)
        return step_bytes(model, batch_tokens=100, trained_bytes=trained, head_rows=head_rows)

    masked = MaskedSpace(model, {"model.norm.weight": torch.arange(32)})
    full = FullSpace(model)

    assert estimated(masked, head_rows=7) == weights + activations + 7 * 512 * 8 + 32 * 20
    assert estimated(masked, local_steps=2) == weights + activations + 32 * 20
    assert estimated(full) == weights + activations + 4 * 64 * 32  # of the embedding rows are made
    assert estimated(full, local_steps=2) == estimated(full) + weights
    assert server_optimizer_bytes(35, 2) == 35 * 4 * 12


@pytest.mark.parametrize(
    ("family", "inner", "wide", "kept"),
    [("llama", 64, 3, 4), ("qwen3", 64, 3, 4), ("mixtral", 2 * 64, 3, 4), ("opt", 64, 2, 1), ("gpt2", 128, 4, 5)],
)
def test_activations_count_by_the_form_of_the_layers(family: str, inner: int, wide: int, kept: int) -> None:
    """Of a token, in one of two layers at a time or in both: Mixtral's runs through two experts."""
    model = tiny_model(family)

    def of_one(**settings: Any) -> int:
        return step_memory(model, batch_tokens=1, trained_bytes=0, **settings).activations

    assert of_one() == 4 * (6 * 32 + wide * inner)
    assert of_one(backward=True) == 2 * 4 * (10 * 32 + kept * inner)


def test_graphs_count_their_pool_and_what_each_keeps() -> None:
    model = tiny_model("llama")

    def of(tokens: int) -> tuple[int, int]:
        step = step_memory(model, batch_tokens=tokens, trained_bytes=0, captured=True)
        assert step[:4] == step_memory(model, batch_tokens=tokens, trained_bytes=0)[:4]
        return step.graphs, step.activations

    graphs, pool = of(100)
    assert graphs == pool + 64 * 100 * (2 * 4 * 32 + 8)
    graphs, pool = of(1 << 20)
    assert graphs == pool + (1 << 30)


def test_a_large_weight_is_perturbed_in_its_own_dtype_and_widened_in_parts() -> None:
    weight = torch.nn.Linear(1 << 12, 1 << 10, bias=False, dtype=torch.bfloat16)

    assert FullSpace(weight).step_bytes(1) == 2 * (1 << 22) + 3 * 4 * (1 << 20)


def test_a_sketch_counts_codes_tables_and_one_decoded_layer_by_hand() -> None:
    sketch = tiny_sketch()
    # of a layer: q, o [32, 32], k, v [16, 32], gate, up [64, 32], down [32, 64]; two codes a byte, 16 entries a row
    codes = 2 * (32 + 32 + 16 + 16 + 64 + 64 + 2 * 32) * 16
    tables = 2 * (32 + 32 + 16 + 16 + 64 + 64 + 32) * 16
    dense = (512 + 5) * 32  # embeddings, which the head shares, and norms
    largest = 64 * 32
    activations, kept = 100 * (6 * 32 + 3 * 64), 2 * 100 * (10 * 32 + 4 * 64)

    def estimated(model: Any, **backward: bool) -> int:
        return step_bytes(model, batch_tokens=100, trained_bytes=0, **backward)

    assert weights_bytes(sketch) == codes + 4 * tables + 4 * dense
    assert estimated(sketch) == weights_bytes(sketch) + 4 * largest + 4 * activations
    narrow = tiny_sketch(dtype=torch.bfloat16)
    assert weights_bytes(narrow) == codes + 4 * tables + 2 * dense
    assert estimated(narrow) == weights_bytes(narrow) + 2 * largest + 2 * activations
    assert estimated(narrow, backward=True) == weights_bytes(narrow) + 4 * largest + 2 * kept
    space = DenseSpace(list(tables_of(sketch).values()))
    assert (space.size, space.step_bytes(3)) == (tables, 20 * tables)
    assert gradient_bytes(sketch, tables, trains_base_weights=TablesConfig().traits.trains_base_weights) == 32 * tables


def test_the_backward_pass_of_a_sketch_on_a_gpu_decodes_beside_the_forward_pass() -> None:
    """There it runs in a thread of its own. Its scratch holds a gradient in float32, or a decoded layer."""
    sketch, largest = tiny_sketch(dtype=torch.bfloat16), 64 * 32
    first = SimpleNamespace(device=torch.device("cuda", 0), element_size=lambda: 2)
    there: Any = SimpleNamespace(named_modules=sketch.named_modules, parameters=lambda: iter([first]))

    assert scratch_bytes(sketch) == scratch_bytes(there) == 2 * largest
    assert scratch_bytes(sketch, backward=True) == 4 * largest
    assert scratch_bytes(there, backward=True) == (2 + 4) * largest


@pytest.mark.parametrize(
    ("config", "moments"),
    [
        (SgdConfig(), 0),
        (MomentumConfig(nesterov=True, weight_decay=0.1), 1),
        (AdamConfig(weight_decay=0.1), 2),
        (ScaffoldConfig(), 4),
        (FedDynConfig(alpha=1.0), 4),
    ],
)
def test_what_a_rule_takes_is_not_more_than_estimated(config: ServerOptimizerConfig, moments: int) -> None:
    n, num_clients, rule = 100_000, 3, SERVER_OPTIMIZERS.build(config, local_steps=1)
    own = isinstance(config, ScaffoldConfig | FedDynConfig)
    owners = tuple(range(num_clients)) if own else (SHARED,)
    c = np.ones((2, 1, len(owners)), np.float32)
    record = ScalarRecord(0, 0.0078125, owners, c, directions=SHARED if own else OWN)
    space = VectorSpace(np.zeros(n, np.float32))

    def one_round() -> Replica:
        replica = Replica(space, server_optimizer=rule, reset=lambda: None, run_seed=1, num_clients=num_clients)
        replica.advance([record])
        return replica

    one_round()  # compiles what makes directions
    tracemalloc.start()
    replica = one_round()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    space_itself = 4 * 4 * n  # VectorSpace makes theta anew at every step
    assert replica.moments.shape == (moments, n)
    assert 4 * n * moments <= peak <= server_optimizer_bytes(n, moments) + space_itself


def test_a_rule_whose_memory_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded, space = tiny_loaded(), VectorSpace(np.zeros(1 << 20, np.float32))

    def fit(num_moments: int) -> int:
        return costs.fitting_tokens_per_batch(
            loaded, space, wanted=4096, longest=100, local_steps=1, num_moments=num_moments
        )

    monkeypatch.setattr(costs, "available_memory_bytes", lambda device: 100 << 20)
    assert fit(0) == 4096
    assert not caplog.records
    assert fit(8) == 2048  # 72 MiB are the rule's
    assert "4096 do not fit in the 28 MiB that are free, so 2048 are used" in caplog.text
    with pytest.raises(ConfigError, match=r"server_optimizer: .* has 17 .* \(108 MiB\), and 100 MiB are free"):
        fit(17)


@pytest.mark.parametrize("family", [*FAMILIES, *WITHOUT_ATTENTION])
def test_every_family_has_an_estimate_that_grows_with_the_batch(family: str) -> None:
    model = tiny_model(family)
    small, large = (step_bytes(model, batch_tokens=n, trained_bytes=0) for n in (64, 640))

    assert weights_bytes(model) < small < large


def test_scores_that_attention_writes_down_count_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 heads, to 512 keys at most, before and after their softmax, in float32."""
    model, asked = tiny_model("llama", dtype=torch.bfloat16), list[tuple[str, torch.dtype]]()

    def step() -> int:
        return step_bytes(model, batch_tokens=64, trained_bytes=0)

    def plainly(device: torch.device, dtype: torch.dtype) -> bool:
        asked.append((device.type, dtype))
        return True

    fused = step()
    monkeypatch.setattr("fedzo.models.memory.attends_plainly", plainly)

    assert step() - fused == 2 * 4 * 512 * 64 * 4
    assert asked == [("cpu", torch.bfloat16)]


def of_a_token(model: Any) -> int:
    small, large = (step_bytes(model, batch_tokens=n, trained_bytes=0) for n in (1, 2))
    return large - small


def test_the_states_of_a_scan_count_by_hand() -> None:
    mamba, mamba2 = tiny_model("mamba"), tiny_model("mamba2")

    # both: hidden 32, inner 64, state 8; Mamba 2: chunks of 32 tokens, 8 heads
    assert of_a_token(mamba) == 4 * (6 * 32 + 3 * 64) + 4 * (4 * 64 * 8)
    assert of_a_token(mamba2) == 4 * (6 * 32 + 3 * 128) + 4 * (8 * 8 * (32 + 8))


@pytest.mark.parametrize("family", HYBRIDS)
def test_the_states_of_a_hybrid_count_by_hand(family: str) -> None:
    model = tiny_model_from(HYBRIDS[family]())

    states = 4 * 64 * 16 if family == "jamba" else 8 * 4 * (64 + 16) * 2  # a text of 32 tokens is padded to 64
    assert of_a_token(model) == 4 * (6 * 32 + 3 * 64) + 4 * states


def test_a_family_of_hybrids_counts_no_states_where_all_layers_are_attention() -> None:
    config: Any = HYBRIDS["granite"]()
    config.layer_types = ["full_attention"] * 2

    assert of_a_token(tiny_model_from(config)) == 4 * (6 * 32 + 3 * 64)


class Peak(TorchDispatchMode):
    """Most bytes of the tensors that lived at one time and were made under it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.given = {StorageWeakRef(each.untyped_storage()) for each in (*model.parameters(), *model.buffers())}
        self.alive: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        storages = [each.untyped_storage() for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
        self.alive |= {ref: each.nbytes() for each in storages if (ref := StorageWeakRef(each)) not in self.given}
        self.alive = {ref: num_bytes for ref, num_bytes in self.alive.items() if not ref.expired()}
        self.most = max(self.most, sum(self.alive.values()))
        return made


@pytest.mark.parametrize("family", [*HYBRIDS, "mamba2"])
def test_a_forward_that_scans_takes_what_is_estimated_or_somewhat_less(family: str) -> None:
    model = tiny_model_from(HYBRIDS[family]()) if family in HYBRIDS else tiny_model(family)
    ids, rows = torch.arange(4 * 32).view(4, 32), torch.arange(4)

    with torch.no_grad(), Peak(model) as peak:
        hidden_at(model, ids, rows, 31 - rows)

    step = step_bytes(model, batch_tokens=ids.numel(), trained_bytes=0) - weights_bytes(model)
    assert peak.most <= step <= 4 * peak.most


AS_OTHERS: list[type[torch.nn.Module]] = [GELUActivation, SiLUActivation]
COUNTED = [torch.nn.ReLU, ReLUSquaredActivation, NewGELUActivation, FastGELUActivation, BloomGelu]


@pytest.mark.parametrize("kind", [*AS_OTHERS, *COUNTED])
def test_the_tensors_of_an_activation_are_counted(kind: type[torch.nn.Module]) -> None:
    """At a time, and kept for a backward pass; its input is ``1 * given``, which nobody else holds."""
    activation, given = kind(), torch.randn(1000, requires_grad=True)

    with torch.no_grad(), Peak(activation) as peak:
        activation(1 * given)
    with Peak(activation) as kept:
        output = activation(1 * given)

    alive = sum(num_bytes for ref, num_bytes in kept.alive.items() if not ref.expired())
    assert output.requires_grad
    assert (peak.most, alive) == tuple(4000 * count for count in memory._ACTIVATIONS.get(kind.__name__, (2, 2)))
    assert {each.__name__ for each in COUNTED} == memory._ACTIVATIONS.keys()


_IDS: dict[str, Any] = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DEEP: dict[str, Any] = {"num_hidden_layers": 12, "num_attention_heads": 4, "hidden_size": 64}
_DEEP |= {"max_position_embeddings": 512, **_IDS}
DENSE: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_DEEP, intermediate_size=192, tie_word_embeddings=True),
    "opt": lambda: OPTConfig(**_DEEP, ffn_dim=256, word_embed_proj_dim=64),
    "gpt2": lambda: GPT2Config(**_IDS, n_embd=64, n_layer=12, n_head=4, n_positions=512),
}
"""So deep that one layer is a small part of the model, as it is in a real one."""
ROWS = [Example(tiny_tokens(row, 32), ((7,), (250,)), 0) for row in range(8)]


def deep(family: str) -> LoadedModel:
    return wrap_model(tiny_model_from(DENSE[family]()), byte_tokenizer(), source=family)


def all_weights(model: Any) -> Space:
    return FullSpace(model)


def some_weights(model: Any) -> Space:
    """Too few to count, as one in a thousand is."""
    places = {name: torch.arange(0, each.numel(), 1000) for name, each in eligible_parameters(model).items()}
    return MaskedSpace(model, places)


def workspace(loaded: LoadedModel, space: Space) -> Workspace:
    rule = SERVER_OPTIMIZERS.build(SgdConfig(), local_steps=1)
    replica = Replica(space, server_optimizer=rule, reset=lambda: None, run_seed=1)
    return Workspace(loaded, replica, tokens_per_batch=4096, forward_cost_tokens=1)


def estimated(at: Workspace, rows: list[Example]) -> Estimate:
    return costs.estimate_run(
        at,
        train=rows,
        scored=[],
        rows_per_step=len(rows),
        steps=1,
        forwards_per_step=2,
        num_rows=len(rows),
        local_steps=1,
    )


def must_be_within_a_tenth(loaded: LoadedModel, space: Space) -> None:
    """The estimate of a run against the most that a step of it takes."""
    told = estimated(workspace(loaded, space), ROWS)
    with Peak(loaded.model) as peak:
        for scale in (1e-3, -1e-3):
            with space.probe(scale, key=5):
                example_losses(loaded, ROWS, Planning(4096), loss=Loss.candidates)
        space.step(1e-3, key=5)

    measured = weights_bytes(loaded.model) + peak.most
    assert measured <= told.memory_bytes <= 1.1 * measured
    assert told.memory_bytes == sum(told.parts.values())
    assert {*told.parts} == {"weights", "activations", "trained values"}
    assert told.parts["weights"] == weights_bytes(loaded.model)
    assert told.device == "cpu"


@pytest.mark.parametrize("make", [all_weights, some_weights])
@pytest.mark.parametrize("family", DENSE)
def test_the_estimate_of_a_step_is_at_most_a_tenth_above_its_peak(family: str, make: Callable[[Any], Space]) -> None:
    loaded = deep(family)

    must_be_within_a_tenth(loaded, make(loaded.model))


@pytest.mark.parametrize("family", DENSE)
def test_so_is_that_of_a_step_that_makes_weights_together(
    family: str, as_on_a_gpu: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = as_on_a_gpu()
    monkeypatch.setattr("fedzo.zo.tensor_group._SMALL", 300)
    monkeypatch.setattr("fedzo.zo.tensor_group._GROUP_BYTES", 100_000)
    loaded = deep(family)
    space = FullSpace(loaded.model)

    must_be_within_a_tenth(loaded, space)

    assert "add_rows" in launched
    assert len(set(space._groups.values())) > 12


@pytest.mark.parametrize("family", DENSE)
def test_so_is_that_of_a_window_that_passes_forth_and_back(family: str) -> None:
    model = deep(family).model
    eligible = eligible_parameters(model)
    windows = [torch.tensor(tiny_tokens(number, 32)) for number in range(2)]
    with Peak(model) as peak:
        WindowGradients(model, windows, next_token_loss).sums(eligible)

    measured = weights_bytes(model) + peak.most
    sums = 2 * 4 * sum(each.numel() for each in eligible.values())
    told = weights_bytes(model) + sums + calibration_window_bytes(model, num_tokens=32)
    assert measured <= told <= 1.1 * measured


def test_a_head_that_a_probe_makes_counts_where_a_forward_reads_all_of_it() -> None:
    loaded = tiny_loaded()
    at = workspace(loaded, FullSpace(loaded.model))
    long = [Example(prompt=(1,) * 6, candidates=((2, 3), (4, 5)), label=0)]

    with_it, without = (estimated(at, rows).parts for rows in (long, ROWS))

    assert with_it["trained values"] - without["trained values"] == 4 * 512 * 32
    assert with_it["LM head"] == 4 * 512 * 8
    assert "LM head" not in without


@pytest.mark.parametrize("make", [all_weights, some_weights])
def test_graphs_count_in_the_estimate_and_in_the_tokens_that_fit(
    make: Callable[[Any], Space], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny_loaded()
    space = make(loaded.model)
    never: Any = None
    ours, _ = capture(loaded, None, longest=64, new_graph=lambda: never)
    tokens = sum(len(row.prompt) for row in ROWS)

    def fit(at: LoadedModel, free: int) -> int:
        monkeypatch.setattr(costs, "available_memory_bytes", lambda device: free)
        return costs.fitting_tokens_per_batch(at, space, wanted=4096, longest=100, local_steps=1, num_moments=0)

    eager, captured = (estimated(workspace(at, space), ROWS).parts for at in (loaded, ours))

    activations = tokens * 4 * (6 * 32 + 3 * 64)
    kept = 64 * tokens * (2 * 4 * 32 + 8)
    again = space.step_bytes(1) if space.perturbs_weights else 0
    assert captured["CUDA graphs"] == activations + kept
    assert captured["trained values"] == eager["trained values"] + again
    assert "CUDA graphs" not in eager
    beside = 4096 * (2 * 4 * (6 * 32 + 3 * 64) + 64 * (2 * 4 * 32 + 8)) + space.step_bytes(1) + again
    assert fit(ours, int(beside / 0.9) + 1) == 4096
    assert fit(ours, int(beside / 0.9) - 9) == 2048
    assert fit(loaded, int(beside / 0.9) - 9) == 4096


@pytest.mark.parametrize(
    ("wanted", "device", "longest", "most"),
    [
        (0, "cpu", 512, 4096),
        (0, "cpu", 5000, 5000),
        (0, "mps", 512, 4096),
        (0, "cuda", 512, 16_384),
        (0, "cuda:1", 20_000, 20_000),
        (512, "cpu", 512, 512),
        (512, "cuda", 512, 512),
        (65_536, "cuda", 512, 65_536),
    ],
)
def test_a_gpu_takes_more_tokens_unless_a_site_says_how_many(wanted: int, device: str, longest: int, most: int) -> None:
    assert most_tokens(wanted, torch.device(device), longest=longest) == most


def test_on_a_gpu_as_many_tokens_are_taken_as_its_own_memory_holds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, space = tiny_loaded(), VectorSpace(np.zeros(1, np.float32))
    loaded = replace(made, device=torch.device("cuda", 0))
    wanted = most_tokens(0, loaded.device, longest=100)

    def fit(free: int) -> int:
        there = {"cuda": free, "cpu": 100 << 20}  # the machine's are for the server optimizer
        monkeypatch.setattr(costs, "available_memory_bytes", lambda device: there[device.type])
        return costs.fitting_tokens_per_batch(loaded, space, wanted=wanted, longest=100, local_steps=1, num_moments=0)

    def needed(tokens: int) -> int:
        return step_bytes(made.model, batch_tokens=tokens, trained_bytes=20) - weights_bytes(made.model)

    assert fit(1 << 40) == 16_384
    assert not caplog.records
    assert fit(int(needed(8192) / 0.9) + 1) == 8192
    assert fit(int(needed(100) / 0.9) + 1) == 100
    assert "16384 do not fit in the" in caplog.text
    assert "so 8192 are used" in caplog.text


def test_a_score_that_goes_on_from_kept_keys_fits_too() -> None:
    """Such keys are counted in tokens of a gated model, which take more than those of OPT."""
    model = tiny_model("opt")
    beside = 4096 * 4 * (6 * 32 + 3 * 64)

    def fit(available: int) -> int:
        return fit_tokens_per_batch(model, wanted=4096, longest=100, available_bytes=available, trained_bytes=0)

    assert step_bytes(model, batch_tokens=4096, trained_bytes=0) - weights_bytes(model) < beside
    assert fit(int(beside / 0.9) + 1) == 4096
    assert fit(int(beside / 0.9) - 9) == 2048


def test_batches_are_halved_until_they_fit() -> None:
    model = tiny_model("llama")

    def fit(available: int) -> int:
        return fit_tokens_per_batch(model, wanted=4096, longest=100, available_bytes=available, trained_bytes=0)

    def needed(tokens: int) -> int:
        return step_bytes(model, batch_tokens=tokens, trained_bytes=0) - weights_bytes(model)

    assert fit(1 << 40) == 4096
    assert fit(int(needed(1024) / 0.9) + 1) == 1024
    assert fit(int(needed(1024) / 0.9) - 9) == 512
    assert fit(int(needed(100) / 0.9) + 1) == 100


def test_logits_over_the_vocabulary_count_and_whole_where_a_backward_pass_keeps_them() -> None:
    model = tiny_model("llama")

    def head(rows: int, *, backward: bool = False) -> int:
        with_it, without = (
            step_bytes(model, batch_tokens=8, trained_bytes=0, head_rows=each, backward=backward) for each in (rows, 0)
        )
        return with_it - without

    many = 1 << 20  # of 512 float32 each: 2 GiB
    assert head(7) == 7 * 512 * 8
    assert head(many) == 2 * (256 << 20)  # a part, and its logarithms
    for rows in (7, many):
        assert head(rows, backward=True) == 512 * 12 * rows  # the logarithms, their gradients, and those of the logits


def test_answers_of_several_tokens_pay_for_the_head_in_plan_and_estimate() -> None:
    space, rule = VectorSpace(np.zeros(1, np.float32)), SERVER_OPTIMIZERS.build(SgdConfig(), local_steps=1)
    replica = Replica(space, server_optimizer=rule, reset=lambda: None, run_seed=1)
    at = Workspace(tiny_loaded(), replica, tokens_per_batch=1, forward_cost_tokens=1)
    short = Example(prompt=(1,) * 10, candidates=((2,), (3,)), label=0)
    long = Example(prompt=(1,) * 6, candidates=((2, 3), (4, 5)), label=0)  # 4 of 16 tokens are read

    def memory(example: Example) -> int:
        told = costs.estimate_run(
            at,
            train=[example],
            scored=[],
            rows_per_step=4,
            steps=1,
            forwards_per_step=2,
            num_rows=1,
            local_steps=1,
        )
        return told.memory_bytes

    assert costs.head_share([short]) == costs.head_share([]) == 0
    assert costs.head_share([short, long]) == 0.25
    assert memory(long) - memory(short) == 4 * 4 * 512 * 8


def test_a_sequence_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"one sequence of 100 tokens needs .* Lower task\.max_length"):
        fit_tokens_per_batch(tiny_model("llama"), wanted=4096, longest=100, available_bytes=1000, trained_bytes=0)


def test_a_token_takes_some_time() -> None:
    found = time_forwards(tiny_loaded(), num_tokens=64)
    assert min(found) >= 0
    assert 0 < found.each + 64 * found.token < 1


def forwards_take(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> list[int]:
    """Let forwards take so long by their tokens, and the first of a size a minute more; gives the tokens of each."""
    now, seen = 0.0, list[int]()

    def forward(model: Any, ids: torch.Tensor, *args: Any) -> torch.Tensor:
        nonlocal now
        now += seconds(ids.numel()) + (0 if ids.numel() in seen else 60)
        seen.append(ids.numel())
        return torch.zeros(1)

    monkeypatch.setattr("fedzo.models.memory.hidden_at", forward)
    monkeypatch.setattr("fedzo.models.memory.time", SimpleNamespace(perf_counter=lambda: now))
    return seen


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        (lambda tokens: 0.02, (0.02, 0.0)),  # the start of every kernel, whatever its size
        (lambda tokens: 1e-3 * tokens, (0.0, 1e-3)),
        (lambda tokens: 0.02 + 1e-4 * tokens, (0.02, 1e-4)),
        (lambda tokens: 1e-6 * tokens**2, (0.0, 1e-6 * 256)),  # the larger forward's time is never missed
        (lambda tokens: 0.02 if tokens > 32 else 0.03, (0.02, 0.0)),  # something else was slow
    ],
)
def test_a_forward_has_a_cost_of_its_own_beside_that_of_its_tokens(
    seconds: Callable[[int], float], found: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = forwards_take(monkeypatch, seconds)

    assert time_forwards(tiny_loaded(), num_tokens=256) == pytest.approx(ForwardSeconds(*found), abs=1e-12)
    assert sizes == [32, 32, 256, 256]


def test_the_time_of_a_run_counts_its_forwards_and_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    space, rule = VectorSpace(np.zeros(1, np.float32)), SERVER_OPTIMIZERS.build(SgdConfig(), local_steps=1)
    replica = Replica(space, server_optimizer=rule, reset=lambda: None, run_seed=1)
    at = Workspace(tiny_loaded(), replica, tokens_per_batch=100, forward_cost_tokens=1)
    example = Example(prompt=(1,) * 30, candidates=((2,), (3,)), label=0)
    forwards_take(monkeypatch, lambda tokens: 0.01 + 1e-5 * tokens)

    told = costs.estimate_run(
        at,
        train=[example],
        scored=[(3, [example] * 50), (2, [])],
        rows_per_step=4,  # 120 tokens: two forwards
        steps=10,
        forwards_per_step=2,
        num_rows=1,
        local_steps=1,
    )

    forwards, tokens = 10 * 2 * 2 + 3 * 15, 10 * 2 * 120 + 3 * 50 * 30
    assert told.seconds == pytest.approx(0.01 * forwards + 1e-5 * tokens)


@pytest.mark.parametrize(("cache_tokens", "batches"), [(0.5, 19), (2.0, 37)])
def test_the_time_of_a_run_counts_the_forwards_that_write_answers(
    cache_tokens: float, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each token of a batch of answers, and those of the loss after them."""
    space, rule = VectorSpace(np.zeros(1, np.float32)), SERVER_OPTIMIZERS.build(SgdConfig(), local_steps=1)
    replica = Replica(space, server_optimizer=rule, reset=lambda: None, run_seed=1)
    at = Workspace(tiny_loaded(), replica, tokens_per_batch=100, forward_cost_tokens=1)
    example = Example(prompt=(1,) * 28, candidates=((2, 3, 4),), label=0, written_from=(1,) * 30)
    forwards_take(monkeypatch, lambda tokens: 0.01 + 1e-5 * tokens)
    monkeypatch.setattr(costs, "cache_tokens", lambda model: cache_tokens)

    told = costs.estimate_run(
        at,
        train=[example],
        scored=[(3, [example] * 50), (2, [])],
        rows_per_step=4,
        steps=0,
        forwards_per_step=2,
        num_rows=1,
        local_steps=1,
        new_tokens=7,
    )

    forwards, tokens = 3 * (16 + batches * 7), 3 * 50 * (31 + 37)  # 1,550 tokens of the loss, 1,850 of the answers
    assert told.seconds == pytest.approx(0.01 * forwards + 1e-5 * tokens)


@pytest.mark.gpu
def test_a_small_forward_of_a_gpu_is_the_start_of_its_kernels() -> None:
    made = tiny_loaded()
    loaded = replace(made, model=made.model.cuda(), device=torch.device("cuda", 0))

    found = time_forwards(loaded, num_tokens=2048)

    assert found.each > 32 * found.token
