"""The file that only a site writes: its keys, its rules, and the template that `fedzo client init` copies."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from fedzo.config.load import load
from fedzo.config.plugins import plugin_classes
from fedzo.config.schema import LaunchConfig, RunConfig, SiteFile, uncompiled
from fedzo.config.travel import from_json, is_same_run, load_site, to_json
from fedzo.errors import ConfigError
from fedzo.evaluate import EVALUATORS, EvaluatorConfig

TEMPLATE = files("fedzo.commands") / "templates" / "site.yaml"


def keys_of(config_class: type, prefix: str = "") -> set[str]:
    hints, found = get_type_hints(config_class), set()
    for field in fields(config_class):
        name = f"{prefix}{field.name}"
        found |= keys_of(hints[field.name], f"{name}.") if is_dataclass(hints[field.name]) else {name}
    return found


def keys_in(plain: dict[str, Any], prefix: str = "") -> set[str]:
    return {
        key
        for name, value in plain.items()
        for key in (keys_in(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"})
    }


def test_the_template_holds_every_key_with_its_default_but_for_the_two_places(tmp_path: Path) -> None:
    text = TEMPLATE.read_text(encoding="utf-8")
    (tmp_path / "site.yaml").write_text(text)

    site, expected = load_site(tmp_path / "site.yaml"), SiteFile()

    assert keys_in(yaml.safe_load(text)) == keys_of(SiteFile) | {"rewriter.plugin"}
    expected.model.name, expected.data.path = str(tmp_path / "model"), str(tmp_path / "rows")
    assert site == expected


def test_every_key_of_the_template_has_a_comment_above_it() -> None:
    lines = TEMPLATE.read_text(encoding="utf-8").splitlines()

    keys = [number for number, line in enumerate(lines) if line.lstrip()[:1] not in ("", "#") and line[-1:] != ":"]

    assert len(keys) == len(keys_of(SiteFile) | {"rewriter.plugin"})
    assert [lines[number] for number in keys if not lines[number - 1].lstrip().startswith("# ")] == []
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{max_steps: -1}", r"limits\.max_steps must be >= 0, got -1"),
        ("{max_rows: -5}", r"limits\.max_rows must be >= 0, got -5"),
        ("{max_probes: -2}", r"limits\.max_probes must be >= 0, got -2"),
        ("{min_rows: -1}", r"limits\.min_rows must be >= 0, got -1"),
        ("{step_limit_s: 0}", r"limits\.step_limit_s must be > 0 and finite, got 0"),
        ("{min_rows: many}", r"limits\.min_rows must be int, got 'many'"),
        ("{trainers: [meerkt]}", r"limits\.trainers must hold names of .*lora, meerkat, .* only, got 'meerkt'"),
        ("{estimators: [fourpoint]}", r"limits\.estimators must hold names of .*two_point.* only, got 'fourpoint'"),
        ("{stages: [rewrite]}", r"limits\.stages must hold names of .*identity.* only, got 'rewrite'"),
        ("{answers: [acuracy]}", r"limits\.answers must hold names of none, loss, accuracy, .*rouge_l.* got 'acuracy'"),
        ("{answers: [none, loss]}", r"limits\.answers must hold none alone"),
        ("{answers: loss}", r"limits\.answers must be list\[str\], got 'loss'"),
        ("{base_digest: abc}", r"limits\.base_digest must be a SHA-256 of 64 hexadecimal digits, got 'abc'"),
        ("{stages: [identity], answers: [stagse]}", r"limits\.answers must hold names of .*stages.* got 'stagse'"),
        ("{steps: 3}", r"limits must hold keys of SiteLimitsConfig only, got unknown \['steps'\]"),
        ("{min_rows: -1, max_rows: -1}", r"limits\.max_rows must be >= 0.*limits\.min_rows must be >= 0"),
    ],
)
def test_what_a_site_cannot_mean_is_refused_with_what_it_could(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(f"limits: {text}\n")

    with pytest.raises(ConfigError, match=rf"(?s)site configuration .*site\.yaml: .*{message}"):
        load_site(tmp_path / "site.yaml")


def test_all_faults_of_a_site_file_are_told_each_on_a_line_of_its_own_with_its_remedy(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(
        "device: 3\nmin_rows: 5\ndata.path: rows\nmodel: [opt]\nrewriter: {plugin: nobody}\n"
        "limits: {min_rows: many, max_row: 7, max_steps: -1, answers: loss, several_clients: 1}\n"
    )
    plugins = ", ".join(sorted(plugin_classes()["rewriter"]))

    with pytest.raises(ConfigError) as caught:
        load_site(file)

    headline, *lines = str(caught.value).splitlines()
    assert headline == f"site configuration {file}: 10 problems in the configuration:"
    assert [line.removeprefix("  - ") for line in lines] == [
        "configuration must hold keys of SiteFile only, got unknown ['data.path']. Write it as data: {path: ...}.",
        "configuration must hold keys of SiteFile only, got unknown ['min_rows']. Did you mean limits.min_rows?",
        "device must be str, got 3. Write text, in quotes.",
        "model must be a mapping for ModelConfig, got ['opt']. Write its keys and their values.",
        f"rewriter.plugin must be one of {plugins} (or of an installed package that registers it), got 'nobody'. "
        "Choose one of these.",
        "limits must hold keys of SiteLimitsConfig only, got unknown ['max_row']. Did you mean limits.max_rows?",
        "limits.answers must be list[str], got 'loss'. Write a list, as in [one, two].",
        "limits.min_rows must be int, got 'many'. Write a whole number.",
        "limits.several_clients must be bool, got 1. Write true or false.",
        "limits.max_steps must be >= 0, got -1. 0 means no limit.",
    ]


def test_the_dtype_of_a_chat_model_is_not_measured(tmp_path: Path) -> None:
    """Measured dtypes compare scalars of training, of which a rewriter has none."""
    (tmp_path / "site.yaml").write_text("rewriter: {plugin: transformers, dtype: auto}\n")

    with pytest.raises(ConfigError, match=r"rewriter\.dtype must be one of float32, bfloat16, float16, got 'auto'"):
        load_site(tmp_path / "site.yaml")
    with pytest.raises(ConfigError, match=r"rewriter\.dtype=auto: .*expected one of \[float32, bfloat16, float16\]"):
        load(["rewriter=transformers", "rewriter.model=smollm2-135m", "rewriter.dtype=auto"])


def test_every_name_that_the_messages_list_is_taken(tmp_path: Path) -> None:
    names = "[loss, accuracy, token_f1, exact_match, rouge_l, per_class, label_counts, stages]"
    allowed = "trainers: [mezo, lora], estimators: [fzoo, two_point], stages: [identity]"
    (tmp_path / "site.yaml").write_text(f"limits: {{{allowed}, answers: {names}}}\n")

    limits = load_site(tmp_path / "site.yaml").limits
    assert (limits.trainers, limits.estimators) == (["mezo", "lora"], ["fzoo", "two_point"])


@dataclass(kw_only=True, slots=True)
class NeedyConfig(EvaluatorConfig):
    """An evaluator that can say what it measures only when its key is given."""

    reference: str


def test_an_installed_evaluator_that_no_run_uses_stops_no_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names are unknown then, so none is refused as unknown."""
    monkeypatch.setattr(EVALUATORS, "_configs", {**EVALUATORS._configs, "needy": NeedyConfig})
    (tmp_path / "site.yaml").write_text("limits: {answers: [loss, likeness]}\n")

    assert load_site(tmp_path / "site.yaml").limits.answers == ["loss", "likeness"]


def test_limits_are_no_setting_of_a_command_line() -> None:
    """A simulation has no limits against itself, and plays several clients."""
    assert "limits" not in {field.name for field in fields(LaunchConfig)}
    with pytest.raises(ConfigError, match="limits"):
        load(["+limits.max_steps=1"])

    limits = load([]).site().limits

    assert (limits.several_clients, limits.vectors, limits.max_probes) == (True, True, 0)


def test_a_site_that_does_without_a_compiler_leaves_the_command_line_as_it_is() -> None:
    config = LaunchConfig()
    config.model.compile = True

    site = uncompiled(config.site())

    assert (site.model.compile, config.model.compile) == (False, True)
    assert replace(site.model, compile=True) == config.model


def test_a_site_names_its_rewriter_by_the_keys_that_differ_from_the_defaults(tmp_path: Path) -> None:
    """Where its files lie is said from the site file's place."""
    file = tmp_path / "site.yaml"
    file.write_text("rewriter: {plugin: none, budget_calls: 7, store: ./kept, examples: ../shown.jsonl}\n")

    rewriter = load_site(file).rewriter

    assert (rewriter.budget_calls, rewriter.max_tokens) == (7, 512)
    assert (rewriter.store, rewriter.examples) == (str(tmp_path / "kept"), str(tmp_path.parent / "shown.jsonl"))
    file.write_text("rewriter: {budget_calls: 7}\n")
    with pytest.raises(ConfigError, match=r"rewriter\.plugin must be one of .*none.*, got None"):
        load_site(file)
    file.write_text("rewriter: {plugin: none, budget_cals: 7}\n")
    with pytest.raises(
        ConfigError, match=r"rewriter must hold keys of NoRewriterConfig only, got unknown \['budget_cals'"
    ):
        load_site(file)


def test_a_rewriter_is_the_sites_own(tmp_path: Path) -> None:
    one, other = load([]), load(["rewriter=none", "rewriter.budget_calls=9", "rewriter.store=here"])

    assert other.site().rewriter.budget_calls == 9
    assert is_same_run(one, other)
    assert "rewriter" not in {field.name for field in fields(RunConfig)}
    assert from_json(to_json(other), LaunchConfig) == other


def test_a_faulty_item_of_a_list_gets_the_remedy_of_an_item(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("limits: {answers: [1]}\n")

    with pytest.raises(ConfigError, match=r"limits\.answers\[0\] must be str, got 1\. Write text, in quotes\.$"):
        load_site(file)
