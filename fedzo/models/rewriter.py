"""``rewriter=transformers``: its settings, apart from what they make, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fedzo.data.preprocess.rephrase.backend import REWRITERS, Backend, RewriterConfig, refuse_broken
from fedzo.errors import Problem, at_least, problem
from fedzo.models.config import EMBEDDED_NAME, DType

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings


@dataclass(kw_only=True, slots=True)
class TransformersConfig(RewriterConfig):
    """A chat model in a local folder: no text leaves this machine."""

    paths: ClassVar[tuple[str, ...]] = (*RewriterConfig.paths, "model", "judge_model")

    dtype: DType = DType.float32
    """Dtype of its weights."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    batch_size: int = 8
    """Most prompts that it answers at once."""

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from self.model_problems()

    def model_problems(self) -> Iterator[Problem]:
        """Broken rules on the models, which no other setting has a part in."""
        yield from at_least("rewriter.batch_size", self.batch_size, 1, "Write 1 for one prompt after the other.")
        if self.dtype is DType.auto:
            yield problem("rewriter.dtype", "be float32, bfloat16 or float16", self.dtype, "Choose one of these.")

    def missing(self) -> Iterator[Problem]:
        yield from RewriterConfig.missing(self)
        for key, name in (("model", self.model), ("judge_model", self.judge_model or self.model)):
            if name != EMBEDDED_NAME and not (name and Path(name).expanduser().is_dir()):
                rule = f"be a folder with a chat model, or {EMBEDDED_NAME}"
                yield problem(f"rewriter.{key}", rule, name, "Nothing is downloaded: give the folder where it lies.")


@REWRITERS.register("transformers", TransformersConfig)
def _transformers(config: TransformersConfig) -> Backend:
    refuse_broken(chain(config.limit_problems(), config.model_problems(), config.missing()))
    from fedzo.models.chat import LocalChat

    return LocalChat(config)
