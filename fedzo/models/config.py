"""What a user can say about the model, and about one that rewrites text (``rewriter=transformers``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fedzo.data.preprocess.backend import REWRITERS, Backend, RewriterConfig
from fedzo.errors import Problem, at_least, problem, refuse

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings

EMBEDDED_NAME = "smollm2-135m"
"""The model that comes with fedzo."""


class DType(StrEnum):
    """The dtype in which the model's weights are held for the forward pass."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    auto = "auto"
    """The fastest that this site measures to be exact enough, else float32. bfloat16, or float32 with rounded
    products (TF32 on a GPU, bfloat16 on a CPU with AMX), must give scalars within 10 % in 10 % less time. A resumed
    run measures again."""


class ChatDType(StrEnum):
    """The dtype of a chat model's weights: no ``auto``, which compares scalars of training steps."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantization(StrEnum):
    """How the weights of linear layers are packed when they are loaded."""

    none = "none"
    int8 = "int8"
    """bitsandbytes' LLM.int8(); about a byte a weight."""
    nf4 = "nf4"
    """bitsandbytes' four-bit NormalFloat, as in QLoRA."""
    torchao_int8 = "torchao_int8"
    """torchao's int8, weights only."""


@dataclass(kw_only=True, slots=True)
class BaseConfig:
    """The model that all peers of a run hold, by its digests; where it lies is each site's own."""

    label: str
    """What people call it: the last part of the name or folder that it was launched with."""
    weights_digest: str
    """SHA-256 of the weights, the same for every dtype and folder."""
    tokenizer_digest: str
    """SHA-256 of the tokenizer's behaviour."""
    architecture_digest: str
    """SHA-256 of how the model computes with its weights (config.json)."""
    dtype: DType | None = None
    """The dtype of the trained values, where these are the model's own weights; None where they have a float32 master,
    so that each site may choose."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A causal language model that transformers can load."""

    name: str = EMBEDDED_NAME
    """``smollm2-135m`` (the embedded model), a hub name, or a local folder."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    gguf_file: str | None = None
    """Name of a GGUF file inside ``name``, if the weights are stored so."""
    dtype: DType = DType.float32
    """Dtype of the weights in a forward; trained values have a float32 master, unless all weights are trained."""
    quantization: Quantization = Quantization.none
    """Quantizes the frozen weights under an adapter. Each site may choose its own. Needs ``fedzo[quantized]``."""
    tokens_per_batch: int = 0
    """Most tokens (padding included) in one forward; larger batches are split. 0 takes 4,096, on CUDA 16,384. Where
    memory does not hold so many, they are halved until it does."""
    compile: bool = False
    """Forwards through ``torch.compile``, on CUDA as CUDA graphs. Batches are padded to a few shapes, and the first
    forward of each waits for the compiler. Needs a C++ compiler; losses differ from eager ones in the last bits."""
    cuda_graphs: bool = False
    """On a CUDA device, record the forwards of each shape once as a CUDA graph and run that; batches are padded to few
    shapes. No effect with ``compile``, ``estimator.freeze_routing`` or gradients. Off by default: no GPU has run it
    yet."""
    reuse_lower_layers: bool = True
    """Compute the blocks below the first trained one once per step, and reuse their output in its other forwards.
    Losses keep their bits. No effect with ``compile``, ``estimator.freeze_routing`` or ``task.loss=score``."""
    lower_layers_cache_mb: int = 0
    """MiB to cache these blocks' output per row, for the whole run. Filled before a client's first step. Scores of
    one-token answers have another cache of this size. Losses differ by rounding."""


@dataclass(kw_only=True, slots=True)
class TransformersConfig(RewriterConfig):
    """A chat model in a local folder: no text leaves this machine."""

    paths: ClassVar[tuple[str, ...]] = (*RewriterConfig.paths, "model", "judge_model")

    dtype: ChatDType = ChatDType.float32
    """Dtype of its weights."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    batch_size: int = 8
    """Most prompts that it answers at once."""

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from at_least("rewriter.batch_size", self.batch_size, 1, "Write 1 for one prompt after the other.")

    def missing(self) -> Iterator[Problem]:
        yield from RewriterConfig.missing(self)
        for key, name in (("model", self.model), ("judge_model", self.judge)):
            if name != EMBEDDED_NAME and not (name and Path(name).expanduser().is_dir()):
                rule = f"be a folder with a chat model, or {EMBEDDED_NAME}"
                yield problem(f"rewriter.{key}", rule, name, "Nothing is downloaded: give the folder where it lies.")


@REWRITERS.register("transformers", TransformersConfig)
def _transformers(config: TransformersConfig) -> Backend:
    refuse(config.missing())  # which is not asked when a site's file is read
    from fedzo.models.chat import LocalChat  # slow to import

    return LocalChat(config)
