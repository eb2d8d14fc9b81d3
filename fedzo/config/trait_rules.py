"""Rules that plugins are under because of what they can do: they read what a config says of it, never its name."""

from __future__ import annotations

from collections.abc import Iterator

from fedzo.config.plugins import option_of, plugin_name
from fedzo.config.schema import LaunchConfig, RunConfig, RunSettings, SiteConfig
from fedzo.data.config import Loss
from fedzo.data.tasks import has_labels, lists_candidates
from fedzo.errors import Problem, problem
from fedzo.fl.config import Aggregation, Directions, Weighting
from fedzo.models.config import DType, Quantization
from fedzo.trainers import named_with

_MIN_DECAY = {DType.bfloat16: 2.0**-8, DType.float16: 2.0**-11}
"""With less, a weight times 1 - lr * decay may be rounded to the weight itself."""

# --- of the site: how this machine holds and runs the model


def compile_problems(site: SiteConfig, config: RunSettings) -> Iterator[Problem]:
    """What a compiled forward cannot do."""
    if not site.model.compile:
        return
    remedy = "Write model.compile=false"
    if reason := config.trainer.traits.cannot_compile:
        rule = f"be false for {option_of(config, 'trainer')}: {reason}"
        yield problem("model.compile", rule, True, f"{remedy}, or train fewer values, as trainer=meerkat does.")
    if config.estimator.sends_vectors:
        chosen = option_of(config, "estimator")
        yield problem("model.compile", f"be false for {chosen}: only the forward pass is compiled", True, f"{remedy}.")
    if config.estimator.freezes_routing:
        rule = (
            "be false with estimator.freeze_routing: the choices of one forward would lie in memory that the next "
            "replay of its CUDA graph overwrites"
        )
        yield problem("model.compile", rule, True, f"{remedy}.")


def quantization_problems(site: SiteConfig, config: RunSettings) -> Iterator[Problem]:
    """Whose weights may be packed."""
    model = site.model
    if model.quantization is Quantization.none:
        return
    if config.trainer.traits.trains_base_weights:
        rule = "be none where the model's own weights are trained"
        remedy = "Write model.quantization=none, or train an adapter, as trainer=lora does."
        yield problem("model.quantization", rule, model.quantization, remedy)
    if model.gguf_file is not None:
        rule = "be none with model.gguf_file, whose weights are packed in their own way and unpacked when read"
        yield problem("model.quantization", rule, model.quantization, "Name a folder of safetensors.")


def dtype_problems(site: SiteConfig, config: RunSettings) -> Iterator[Problem]:
    """Where peers may choose the dtype for themselves."""
    dtype = site.model.dtype
    if dtype is DType.auto and config.task.loss is Loss.score:
        rule = "be float32, bfloat16 or float16 for task.loss=score: scores tell little of how exact a dtype is"
        yield problem("model.dtype", rule, "auto", "Write model.dtype=float32 if in doubt.")
    if config.trainer.traits.float32_master:
        return
    trainer = option_of(config, "trainer")
    if dtype is DType.auto:
        rule = f"be float32, bfloat16 or float16 for {trainer}, whose trained values have this dtype on all peers"
        yield problem("model.dtype", rule, "auto", "Write model.dtype=float32 if in doubt.")
    elif isinstance(config, RunConfig) and dtype is not config.base.dtype:
        rule = f"be {config.base.dtype} in this run of {trainer}, whose trained values have this dtype on all peers"
        yield problem("model.dtype", rule, dtype, f"Write model.dtype={config.base.dtype}.")
    optimizer = config.server_optimizer
    lr = optimizer.lr_in(config) * optimizer.decay_share
    if (least := _MIN_DECAY.get(dtype, 0.0)) > lr * optimizer.weight_decay > 0:
        rule = (
            f"make lr * weight_decay 0, or at least {least:g} up to the last round, whose lr is {lr:g}: less is "
            f"rounded away in {dtype}"
        )
        remedy = "Write server_optimizer.weight_decay=0, or model.dtype=float32."
        yield problem("server_optimizer.weight_decay", rule, optimizer.weight_decay, remedy)
    if config.estimator.sends_vectors and dtype is not DType.float32:
        chosen = option_of(config, "estimator")
        rule = f"be float32 for {chosen} with {trainer}, which has no float32 values beside the model's weights"
        yield problem("model.dtype", rule, dtype, "Write model.dtype=float32.")


def format_problems(config: RunSettings, *, is_sketch: bool, packed_as: str | None, name: str) -> Iterator[Problem]:
    """Whether the trainer can train a model in the format in which it was loaded.

    Args:
        config: The run.
        is_sketch: Whether the model is a sketch.
        packed_as: By what its weights are packed, if they are and it is none.
        name: ``model.name``.
    """
    traits, trainer = config.trainer.traits, plugin_name("trainer", config.trainer)
    if is_sketch and traits.cannot_train_sketch:
        rule = f"be one that trains sketches, as {name!r} is: {trainer} cannot, since {traits.cannot_train_sketch}"
        of_sketches = named_with(lambda able: bool(able.cannot_train_dense and not able.cannot_train_sketch))
        yield problem("trainer", rule, trainer, f"Write {', '.join([*of_sketches, 'or name'])} the dense model.")
    if not is_sketch and traits.cannot_train_dense:
        rule = f"be one that trains dense models, as {name!r} is: {trainer} cannot, since {traits.cannot_train_dense}"
        how = f"`fedzo sketch --out FOLDER --calibration FILE model={name}`"
        remedy = f"Choose another trainer, or make a sketch of the model with {how} and write model=FOLDER."
        yield problem("trainer", rule, trainer, remedy)
    if packed_as is not None and traits.trains_base_weights:
        rule = f"leave the weights of {name!r} as they are, which are stored packed (quant_method={packed_as})"
        remedy = "Train an adapter, as trainer=lora does, or name the model that it was packed from."
        yield problem("trainer", rule, trainer, remedy)


# --- of the launch: how the clients run


def runtime_problems(config: LaunchConfig) -> Iterator[Problem]:
    """What clients that share forwards cannot compute."""
    if config.runtime.traits.joins_forwards and config.estimator.sends_vectors:
        chosen = option_of(config, "estimator")
        rule = f"be false for {chosen}: the forwards of several clients would give one gradient"
        yield problem("runtime.batch_clients", rule, True, "Write runtime=inline.")


# --- of the run: what its parts are to each other


def partition_problems(config: RunSettings) -> Iterator[Problem]:
    """What rows must have to be dealt."""
    if config.partition.traits.by_label and not has_labels(config.task):
        listed = "rows that list their own candidates, which have none"
        which = listed if lists_candidates(config.task) else f"task.kind={config.task.kind}, which has none"
        rule = f"not depend on labels for {which}"
        yield problem("partition", rule, plugin_name("partition", config.partition), "Use partition=iid or natural.")
    if config.partition.traits.own_rows:
        yield from _own_rows(config, option_of(config, "partition"))


def _own_rows(config: RunSettings, chosen: str) -> Iterator[Problem]:
    """What a server without rows cannot do."""
    if config.step_policy.traits.needs_labels and not config.fl.label_counts:
        policy = option_of(config, "step_policy")
        rule = f"be true for {policy} with {chosen}, where the server does not know the labels"
        yield problem("fl.label_counts", rule, False, "Or choose another step policy.")
    if config.evaluation.central:
        rule = f"be false for {chosen}, where the server has no dev and test rows"
        yield problem("evaluation.central", rule, True, "The clients score their held-out rows.")


def server_optimizer_problems(config: RunSettings) -> Iterator[Problem]:
    """What the memory of a server optimizer needs of the trained values, and its walks of the clients."""
    traits, name = config.server_optimizer.traits, plugin_name("server_optimizer", config.server_optimizer)
    if traits.keeps_moments and not config.trainer.traits.float32_master:
        rule = (
            f"be sgd for {option_of(config, 'trainer')}: the others keep float32 numbers for every weight of the model "
            "on every peer"
        )
        remedy = "Write server_optimizer=sgd, or train fewer values, as trainer=meerkat does."
        yield problem("server_optimizer", rule, name, remedy)
    if traits.walks_clients:
        yield from _walks(config, option_of(config, "server_optimizer"))


def _walks(config: RunSettings, chosen: str) -> Iterator[Problem]:
    other = "or another server_optimizer."
    if config.fl.directions is not Directions.shared:
        rule = f"be shared for {chosen}, whose log keeps each client's own scalars along shared directions"
        yield problem("fl.directions", rule, config.fl.directions, f"Write fl.directions=shared, {other}")
    if config.strategy.weighting is not Weighting.uniform:
        rule = f"be uniform for {chosen}, whose state is an unweighted mean over the clients"
        yield problem(
            "strategy.weighting", rule, config.strategy.weighting, f"Write strategy.weighting=uniform, {other}"
        )
    if config.strategy.aggregation is not Aggregation.mean:
        rule = f"be mean for {chosen}, which averages the clients' models and not their scalars"
        yield problem(
            "strategy.aggregation", rule, config.strategy.aggregation, f"Write strategy.aggregation=mean, {other}"
        )
    if config.step_policy.traits.stops_clients:
        rule = f"be none for {chosen}, which needs all local steps of every client"
        got = plugin_name("step_policy", config.step_policy)
        yield problem("step_policy", rule, got, f"Write step_policy=none, {other}")
    if config.server_optimizer.weight_decay != 0:
        rule = f"be 0 for {chosen}, whose corrections do not include decay"
        remedy = "Write server_optimizer.weight_decay=0."
        yield problem("server_optimizer.weight_decay", rule, config.server_optimizer.weight_decay, remedy)


def gradient_problems(config: RunSettings) -> Iterator[Problem]:
    """What cannot be where clients compute gradients and send vectors."""
    if not config.estimator.sends_vectors:
        return
    chosen = option_of(config, "estimator")
    other = "or choose another estimator."
    if config.fl.directions is not Directions.shared:
        rule = f"be shared for {chosen}, which has no directions"
        yield problem("fl.directions", rule, config.fl.directions, f"Write fl.directions=shared, {other}")
    if not config.server_optimizer.traits.takes_vectors:
        name = plugin_name("server_optimizer", config.server_optimizer)
        rule = f"be one that moves the model by a vector for {chosen}, such as sgd"
        yield problem("server_optimizer", rule, name, f"Write server_optimizer=sgd, {other}")
    if config.step_policy.traits.compares_abs_g:
        rule = f"not read scalars g for {chosen}, whose clients send none"
        got = plugin_name("step_policy", config.step_policy)
        yield problem("step_policy", rule, got, f"Write step_policy=none, {other}")
    if config.strategy.aggregation is Aggregation.majority_sign:
        rule = f"be mean, median or trimmed_mean for {chosen}: a vector is not a vote"
        yield problem("strategy.aggregation", rule, "majority_sign", f"Write strategy.aggregation=mean, {other}")


def score_problems(config: RunSettings) -> Iterator[Problem]:
    """What trains on an evaluator's value needs, and cannot have."""
    if config.task.loss is not Loss.score:
        return
    if not config.evaluators:
        rule = "name one for task.loss=score, which trains on the value of the first"
        yield problem("evaluators", rule, [], "Write evaluators=[answers], or another task.loss.")
    if config.estimator.sends_vectors:
        rule = f"be candidates or lm for {option_of(config, 'estimator')}, since the value of a score has no gradient"
        yield problem("task.loss", rule, "score", "Choose another estimator, such as two_point, or another loss.")
    if config.estimator.freezes_routing:
        rule = "be false for task.loss=score: held choices (argmax) are also those by which a text is written"
        yield problem("estimator.freeze_routing", rule, True, "Leave it out, or choose another task.loss.")


def step_policy_problems(config: RunSettings) -> Iterator[Problem]:
    """What a step policy must be able to read off a round."""
    traits = config.step_policy.traits
    if traits.compares_abs_g and (reason := config.estimator.traits.incomparable_g):
        got = plugin_name("estimator", config.estimator)
        remedy = "Choose another, such as two_point, or step_policy=none."
        yield problem("estimator", f"not be {got} for a step policy that reads |g|: {reason}", got, remedy)
    if traits.compares_abs_g and config.strategy.aggregation is Aggregation.majority_sign:
        rule = "not be majority_sign for a step policy that reads |g|: the clients send only the sign of g"
        yield problem("strategy.aggregation", rule, "majority_sign", "Choose another, or step_policy=none.")
    if traits.needs_labels and not has_labels(config.task):
        got = plugin_name("step_policy", config.step_policy)
        rule = f"not be {got} for a task without labels"
        yield problem("step_policy", rule, got, "Choose a task with labels, or another step_policy.")
