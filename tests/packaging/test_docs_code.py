"""The code in the documentation runs, as it stands there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedzo.data.tasks import Rendered

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = {
    "fedzo.config.schema": "RunSettings",
    "fedzo.data.config": "Loss TaskConfig",
    "fedzo.data.embedded": "package_dir rotten_tomatoes",
    "fedzo.data.encode": "Example",
    "fedzo.data.partition": "PARTITIONERS PartitionConfig PartitionTraits",
    "fedzo.data.partition.base": "shuffled",
    "fedzo.data.preprocess": "STAGES StageConfig StageContext",
    "fedzo.data.preprocess.backend": "BusyError Completion EndpointError NoRewriterConfig REWRITERS RewriterConfig "
    "RowFault RowReason",
    "fedzo.data.tasks": "render",
    "fedzo.errors": "FedzoError Problem problem",
    "fedzo.evaluate": "EVALUATORS EvaluatorConfig Measure",
    "fedzo.fl.exchange": "Grid",
    "fedzo.fl.server.step_policy": "Plan STEP_POLICIES StepPolicyConfig StepPolicyTraits",
    "fedzo.fl.server.step_policy.plan": "EarlyStop EarlyStopConfig Verdict",
    "fedzo.models.generate": "answer_ends generate",
    "fedzo.models.loaded": "LoadedModel",
    "fedzo.models.scoring": "mean_loss",
    "fedzo.report.trackers": "TRACKERS TrackerConfig",
    "fedzo.run.apps": "client_app run_config server_app",
    "fedzo.runtime.config": "RUNTIMES RuntimeConfig RuntimeTraits",
    "fedzo.runtime.inline": "run_inline",
    "fedzo.testing": "check_estimator check_evaluator check_partition check_server_optimizer check_space check_stage "
    "check_step_policy check_trainer",
    "fedzo.testing.logs": "audit_line",
    "fedzo.testing.tiny_models": "tiny_loaded",
    "fedzo.trainers": "Built InputsConfig Prepared TRAINERS TrainerConfig TrainerContext TrainerTraits",
    "fedzo.trainers.artifacts": "Artifact",
    "fedzo.zo.config": "Distribution",
    "fedzo.zo.directions": "SHARED add_direction direction gaussians permutation philox_words stream_key",
    "fedzo.zo.estimator": "Baseline ESTIMATORS EstimatorConfig EstimatorTraits Fzoo GradientEstimator LossFn OneSided "
    "Projection TwoPoint ZerothOrderConfig projections",
    "fedzo.zo.keys": "step_keys",
    "fedzo.zo.log": "ScalarRecord",
    "fedzo.zo.server_optimizer": "SERVER_OPTIMIZERS ServerOptimizerConfig ServerOptimizerTraits build_server_optimizer "
    "decay end_models norm round_direction step_along",
    "fedzo.zo.spaces.base": "MasterSpace Space Values",
    "fedzo.zo.spaces.dense": "DenseSpace",
    "fedzo.zo.spaces.full": "FullSpace",
    "fedzo.zo.spaces.masked": "MaskedSpace",
    "fedzo.zo.steps": "Drift",
}
"""What the pages import and the how-to guides name, by module: a version that changes one of them says so."""
USE_TRAINER = """
from fedzo.testing.tiny_models import tiny_loaded
from fedzo.config.plugins import plugin_classes

assert plugin_classes()["trainer"]["vectors"] is VectorsConfig
loaded = tiny_loaded("opt")
built = TRAINERS.build(VectorsConfig(skip="bias")).build(loaded, b"", distribution=Distribution.gaussian)
weights = [w for name, w in loaded.model.named_parameters() if w.dim() == 1 and "bias" not in name]
before = [w.detach().clone() for w in weights]
start = built.space.digest()
built.space.step(0.5, 7)
assert all((w != old).any() for w, old in zip(weights, before, strict=True))
built.reset()
assert built.space.digest() == start
print(built.space.size, sum(w.numel() for w in weights))
"""


USE_ESTIMATOR = """
from fedzo.config.plugins import plugin_classes
from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.directions import direction

assert plugin_classes()["estimator"]["four_point"] is FourPointConfig
space = VectorSpace(np.zeros(3))
cubic = lambda: float((space.theta.astype(float) ** 3).sum() + space.theta.astype(float) @ [1, -2, 3])
estimator = ESTIMATORS.build(FourPointConfig(eps=0.5))
(projection,) = estimator.estimate(space, cubic, [7])
assert abs(projection.g - direction(7, 3).astype(float) @ [1, -2, 3]) < 1e-5  # the stencil is exact on cubics
(dropped,) = estimator.estimate(space, lambda: float("nan"), [7])
assert dropped.dropped
"""
USE_RULE = """
from fedzo.config.plugins import plugin_classes
from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.directions import SHARED, direction, stream_key

assert plugin_classes()["server_optimizer"]["sign"] is SignConfig
rule, space = SERVER_OPTIMIZERS.build(SignConfig(weight_decay=0.5), local_steps=1), VectorSpace(np.ones(4))
record = ScalarRecord(round=0, lr=0.5, owners=(SHARED,), coefficients=np.full((1, 1, 1), 2, np.float32))
rule.apply(space, np.zeros((0, 4), np.float32), record, run_seed=3)
assert (space.theta == 0.75 - 0.5 * np.sign(direction(stream_key(3, round=0), 4))).all()
"""
USE_SPACE = """
from fedzo.testing import check_space
from fedzo.zo.directions import direction


def network(dtype):
    torch.manual_seed(3)
    return nn.Linear(6, 4).requires_grad_(False).to(dtype)


x, d, z = torch.linspace(-1, 1, 18).reshape(3, 6), *(torch.from_numpy(direction(i, 24)).reshape(4, 6) for i in (1, 7))
for dtype in (torch.float32, torch.bfloat16):
    for law in Distribution:
        check_space(
            lambda model: Scaled(model.weight, d, law),
            lambda: network(dtype),
            outputs=lambda model: model(x.to(dtype)),
            distribution=law,
        )
model = network(torch.float32)
start = model.weight.clone()
Scaled(model.weight, d, Distribution.gaussian).step(0.5, 7)
assert torch.equal(model.weight, start - d * (0.5 * z))
"""
USE_POLICY = """
from fedzo.config.plugins import plugin_classes
from fedzo.testing.logs import audit_line

assert plugin_classes()["step_policy"]["quiet"] is QuietConfig
policy = STEP_POLICIES.build(QuietConfig(), num_clients=3, local_steps=4, run_seed=0)
g = {0: [[2.0], [-1.0]], 1: [[0.0], [0.0]], 2: [[0.0], [0.1]]}
lost = {1: [[True], [True]], 2: [[True], [False]]}
plan = policy.plan([audit_line(g, dropped=lost)], {})
assert plan.flagged == [2], plan  # 0.1 is below a quarter of the median, 0.8; of client 1 nothing is known
assert plan.verdicts[0].statistics == {"abs_g": 1.5}
assert plan.steps == {0: 4, 1: 4, 2: 1}
nothing = policy.plan([audit_line({0: [[0.0]]}, dropped={0: [[True]]})], {})
assert nothing.steps == {0: 4, 1: 4, 2: 4}
"""


def code(page: str, language: str, *, number: int = 0) -> str:
    """A block of a language on a page, the first unless another number is given."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    assert len(found) > number, f"{page} has {len(found)} {language} blocks"
    return str(found[number])


def test_trainer_of_the_how_to_is_a_working_plugin(tmp_path: Path) -> None:
    program = tmp_path / "vectors.py"  # a process of its own: the registry is closed to the other tests
    program.write_text(code("how-to-add-a-trainer.md", "python") + USE_TRAINER, encoding="utf-8")

    done = subprocess.run([sys.executable, str(program)], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    size, expected = done.stdout.split()
    assert size == expected != "0"


def test_estimator_and_rule_of_the_how_to_are_working_plugins(tmp_path: Path) -> None:
    estimator, rule = (code("how-to-add-an-estimator.md", "python", number=number) for number in range(2))
    program = tmp_path / "plugins.py"
    program.write_text(estimator + USE_ESTIMATOR + rule + USE_RULE, encoding="utf-8")

    done = subprocess.run([sys.executable, str(program)], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_space_and_step_policy_of_the_how_tos_do_what_their_pages_say(tmp_path: Path) -> None:
    programs = {
        "space.py": code("how-to-add-a-trainer.md", "python", number=1) + USE_SPACE,
        "policy.py": code("how-to-add-a-plugin.md", "python", number=3) + USE_POLICY,
    }
    for name, text in programs.items():
        program = tmp_path / name
        program.write_text(text, encoding="utf-8")

        done = subprocess.run([sys.executable, str(program)], cwd=ROOT, capture_output=True, text=True, check=False)

        assert done.returncode == 0, done.stderr


def test_loop_of_the_how_to_learns_and_its_scalars_make_the_same_bits(tmp_path: Path) -> None:
    program = tmp_path / "loop.py"
    text = code("how-to-own-loop.md", "python")
    unknown = "\nimport sys\nassert not {'flwr', 'hydra', 'transformers'} & set(sys.modules)\n"
    program.write_text(text + unknown + code("how-to-own-loop.md", "python", number=1), encoding="utf-8")

    done = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    accuracy, same = done.stdout.splitlines()
    assert float(accuracy.removeprefix("accuracy ")) > 0.9
    assert same == "the same bits: True"


def test_pandas_lines_of_the_guide_keep_jobs_whose_key_is_empty_or_null(tmp_path: Path) -> None:
    numbers = ("dev_loss", "test_after", "test_loss", "bytes_per_client", "forwards", "round_seconds")
    rows = [("trainer.lr", "metric", "state", *numbers)]
    finished = [("", "0.5", "finished"), ("", "0.7", "finished"), ("null", "0.4", "finished")]
    for lr, loss, state in [*finished, ("1", "0.1", "failed")]:
        rows.append((lr, "accuracy", state, loss, "", *(4 * ("8",))))
    (tmp_path / "SWEEP").mkdir()
    (tmp_path / "SWEEP" / "sweep.csv").write_text("".join(",".join(row) + "\n" for row in rows), encoding="utf-8")
    text = code("how-to-trackers-and-sweeps.md", "python")
    program = tmp_path / "table.py"
    told = "\nfor name in ('seeds', 'bytes_per_client', 'dev_loss'):\n    print(table[name].round(6).tolist())\n"
    program.write_text(text + told, encoding="utf-8")

    done = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == ["[1, 2]", "[8.0, 8.0]", "[0.4, 0.6]"]


def test_plugins_of_the_how_tos_pass_the_checks_as_their_page_calls_them(tmp_path: Path) -> None:
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    blocks = {
        "vectors": ("how-to-add-a-trainer.md", 0),
        "four_point": ("how-to-add-an-estimator.md", 0),
        "sign": ("how-to-add-an-estimator.md", 1),
        "nats": ("how-to-own-task.md", 0),
        "by_length": ("how-to-add-a-plugin.md", 0),
        "squeeze": ("how-to-add-a-plugin.md", 1),
        "quiet": ("how-to-add-a-plugin.md", 3),
    }
    for name, (page, number) in blocks.items():
        (package / f"{name}.py").write_text(code(page, "python", number=number), encoding="utf-8")
    (tmp_path / "test_plugins.py").write_text(code("how-to-test-a-plugin.md", "python"), encoding="utf-8")

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 passed" in done.stdout


def test_task_of_the_how_to_composes(tmp_path: Path) -> None:
    from fedzo.config.load import load
    from fedzo.config.overrides import with_config_dir

    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "verdict.yaml").write_text(code("how-to-own-task.md", "yaml"), encoding="utf-8")
    rows = tmp_path / "reviews.jsonl"
    rows.write_text('{"text": "Runs hot.", "stars": "bad"}\n', encoding="utf-8")

    config = load(with_config_dir(["task=verdict", "data=files", f"data.path={rows}"], str(tmp_path)))

    assert config.task.candidates == [" poor", " fine"]
    assert config.task.labels == ["bad", "good"]


def test_command_line_of_the_how_to_composes(tmp_path: Path) -> None:
    from fedzo.config.load import load

    rows = tmp_path / "reviews.jsonl"
    rows.write_text('{"text": "Runs hot.", "stars": "bad"}\n', encoding="utf-8")
    text = (ROOT / "docs" / "how-to-own-task.md").read_text(encoding="utf-8")
    command = re.search(r"^fedzo train (task=custom.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert command is not None

    overrides = shlex.split(command[1].replace("\\\n", " ").replace("reviews.jsonl", str(rows)))
    config = load(overrides)

    assert config.task.template == "{text} This product is"
    assert config.task.label == "stars"


def test_rows_that_list_their_candidates_fit_the_command_line_of_the_how_to(tmp_path: Path) -> None:
    rendered = rendered_of("## Candidates in a list", tmp_path / "questions.jsonl")

    assert rendered.prompt == "Question: Which gas do plants take in? Answer:"
    assert (rendered.label, rendered.answers) == (1, (" oxygen", " carbon dioxide", " helium", " neon"))


def test_the_conversation_of_the_how_to_fits_its_command_line(tmp_path: Path) -> None:
    rendered = rendered_of("## Conversations", tmp_path / "chats.jsonl")

    assert [turn["role"] for turn in rendered.chat] == ["system", "user", "assistant", "user"]
    assert (rendered.system, rendered.answers) == ("Answer in one sentence.", ("Oxygen.",))


def rendered_of(section: str, rows: Path) -> Rendered:
    """The row of a section of the how-to on tasks, as its command reads it; ``rows`` is the file that this names."""
    from fedzo.config.load import load
    from fedzo.data.tasks import render

    page = (ROOT / "docs" / "how-to-own-task.md").read_text(encoding="utf-8")
    row, command = re.findall(r"^```\n(.*?)^```", page.partition(section)[2], flags=re.DOTALL | re.MULTILINE)[:2]
    rows.write_text(row, encoding="utf-8")
    words = shlex.split(command.replace("\\\n", " ").replace(rows.name, str(rows)).replace("FOLDER", str(rows.parent)))
    return render(json.loads(row), load(words[2:]).task)


def test_the_command_line_of_the_how_to_trains_on_token_f1(tmp_path: Path) -> None:
    from fedzo.config.load import load

    page = (ROOT / "docs" / "how-to-own-task.md").read_text(encoding="utf-8")
    _, _, section = page.partition("## Train on a score")
    (command, *_) = re.findall(r"^```\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
    rows = tmp_path / "questions.jsonl"
    rows.write_text("{}", encoding="utf-8")

    config = load(shlex.split(command.replace("questions.jsonl", str(rows)))[2:])

    assert (config.task.kind, config.task.loss, [*config.evaluators]) == ("generation", "score", ["answers"])


def test_commands_of_the_pages_hold_nothing_that_zsh_reads_otherwise_than_bash() -> None:
    """Brackets without quotes are a pattern there, and at its prompt there are no comments."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    pages += (ROOT / "experiments").rglob("README.md")
    fence = re.compile(r"^ *```([^\n]*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
    lines = [
        line
        for page in pages
        for language, block in fence.findall(page.read_text(encoding="utf-8"))
        if language in ("", "text")
        for line in block.splitlines()
    ]

    assert any(line.startswith("fedzo train") for line in lines)
    assert [line for line in lines if "=[" in re.sub(r"'[^']*'|\"[^\"]*\"", "", line)] == []
    assert [line for line in lines if re.search(r"# .*['`]", line)] == []


def test_the_pages_that_come_first_say_for_which_shell_all_commands_are() -> None:
    for page in ("README.md", "docs/index.md", "docs/tutorial-first-run.md"):
        words = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert "All commands are for bash: on macOS, call `bash` first." in words, page


def test_the_paper_s_tests_of_the_how_to_know_no_limit_on_the_share_of_flagged_clients() -> None:
    from fedzo.config.load import load
    from fedzo.fl.server.step_policy.statistics import Statistic
    from fedzo.fl.server.step_policy.vpcs import VpcsConfig, VpcsTest

    text = (ROOT / "docs" / "how-to-non-iid.md").read_text(encoding="utf-8")
    command = re.search(r"`(step_policy=vpcs step_policy\.statistic=gradip [^`]*)`", text)
    assert command is not None

    policy = load(shlex.split(command[1])).step_policy

    assert policy == VpcsConfig(statistic=Statistic.gradip, tests=[VpcsTest.ratio, VpcsTest.quiet], max_share=1)


def test_the_experiment_and_the_preset_of_the_how_to_are_chosen_by_their_names(tmp_path: Path) -> None:
    from fedzo.config.load import load

    experiment, preset = (code("how-to-own-experiment.md", "yaml", number=number) for number in range(2))
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "hospital.yaml").write_text(experiment)
    name = re.search(r"my_conf/(trainer/\w+\.yaml)", preset)
    assert name is not None
    (tmp_path / name[1]).parent.mkdir()
    (tmp_path / name[1]).write_text(preset)
    mine = f"hydra.searchpath=[file://{tmp_path}]"

    config = load([mine, "experiment=hospital", "fl.rounds=20"])
    assert (type(config.trainer).__name__, config.trainer.lr, config.fl.num_clients) == ("LoraTrainerConfig", 1e-3, 2)
    assert (config.fl.rounds, config.task) == (20, load(["experiment=meerkat"]).task)
    assert load([mine, "trainer=careful_lora"]).trainer.lr == 5e-4


def test_entry_point_group_of_the_how_to_is_the_one_that_is_read() -> None:
    from fedzo.registry import ENTRY_POINT_GROUP

    for page in ("how-to-add-a-trainer.md", "how-to-add-an-estimator.md", "how-to-add-a-plugin.md"):
        assert tomllib.loads(code(page, "toml"))["project"]["entry-points"].keys() == {ENTRY_POINT_GROUP}


def test_every_kind_of_plugin_stands_on_the_page_of_plugins_with_its_registry() -> None:
    from fedzo.config.plugins import LISTS, REGISTRIES

    text = (ROOT / "docs" / "how-to-add-a-plugin.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [\w ]+ \| `(\w+)=(?:\[\])?` \| `([\w.]+)\.(\w+)` \| \[", text, flags=re.MULTILINE)

    assert {group: getattr(import_module(module), name) for group, module, name in rows} == {**REGISTRIES, **LISTS}


def test_what_the_pages_import_and_the_guides_name_is_the_public_interface_and_is_there() -> None:
    public = {(module, name) for module, names in PUBLIC.items() for name in names.split()}
    imports = re.compile(r"from (fedzo[\w.]*) import (\([^)]*\)|[^\n;]+)")
    imported = {
        (module, name)
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        for module, names in imports.findall(block)
        for name in re.findall(r"\w+", names)
    }

    assert imported <= public
    assert sorted(name for _, name in public - imported) == sorted(named_by_guides() - {name for _, name in imported})
    assert [(module, name) for module, name in public if not hasattr(import_module(module), name)] == []


def named_by_guides() -> set[str]:
    """Classes of fedzo, and what stands with its module, in the text of the how-to guides."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "fedzo").rglob("*.py")]
    classes = {name for source in sources for name in re.findall(r"^class (\w+)", source, re.MULTILINE)}
    named: set[str] = set()
    for page in (ROOT / "docs").glob("how-to-*.md"):
        text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for piece in re.findall(r"`([^`]+)`", text):
            named |= classes & {*re.findall(r"\w+", piece)}
            paths = {*re.findall(r"\bfedzo(?:\.\w+){2,}", piece)}
            named |= {path.rpartition(".")[2] for path in paths if not is_module(path)}
    return named


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()
