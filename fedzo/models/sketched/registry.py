"""How transformers reads and writes a sketch: ``quant_method: fedzo_sketch`` in its registry.

``import fedzo`` has this module imported when transformers' registry is. Then ``from_pretrained`` puts ``SketchLinear``
in the place of linear layers before it reads their codes and tables; no code of the folder runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fedzo.errors import ConfigError, printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "fedzo_sketch"
"""``quant_method`` in the ``quantization_config`` of a config.json."""


@register_quantization_config(METHOD)
class SketchFormat(QuantizationConfigMixin):
    """What ``quantization_config`` says of a sketch.

    Attributes:
        bits: Of a code.
        groups_per_row: Tables a row.
        modules_to_not_convert: Full names of the linear layers that are dense.

    Raises:
        ConfigError: One is missing or cannot be, or there is something beside them.
    """

    def __init__(
        self,
        bits: Any = None,
        groups_per_row: Any = None,
        modules_to_not_convert: Any = None,
        quant_method: str = METHOD,
        **others: object,
    ) -> None:
        names = modules_to_not_convert
        if type(bits) is not int or not 2 <= bits <= 4:
            raise _wrong("bits must be 2, 3 or 4", bits)
        if type(groups_per_row) is not int or groups_per_row < 1:
            raise _wrong("groups_per_row must be a whole number from 1 on", groups_per_row)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise _wrong("modules_to_not_convert must be a list of names of layers", names)
        if others:
            raise _wrong("there must be no other settings", sorted(others))
        self.quant_method: Any = quant_method
        self.bits, self.groups_per_row = bits, groups_per_row
        self.modules_to_not_convert = list(names)


def _wrong(rule: str, got: object) -> ConfigError:
    shown = printable(repr(got), most=100)
    return ConfigError(
        f"quantization_config of a sketch: {rule}, got {shown}. Copy the folder's config.json again, or build the "
        "sketch anew."
    )


@register_quantizer(METHOD)
class SketchQuantizer(HfQuantizer):
    """Replaces layers before weights are read; tables are float32 in a model of any dtype."""

    requires_calibration = True
    quantization_config: SketchFormat

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        from fedzo.models.sketched.layers import replace_layers

        form = self.quantization_config
        replace_layers(model, bits=form.bits, groups_per_row=form.groups_per_row, keep=form.modules_to_not_convert)
        model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), "tables"}

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, str]]:
        """What is stored (``stored_state``), and nothing to say of it."""
        from fedzo.models.sketched.layers import stored_state

        return stored_state(model), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def mark_as_sketch(model: Any, form: SketchFormat) -> None:
    """Let ``save_pretrained`` write a model whose layers were replaced in memory as one that was read would be."""
    quantizer = SketchQuantizer(form, pre_quantized=True)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    model.is_quantized = True
    model.quantization_method = METHOD
