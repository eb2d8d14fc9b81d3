"""Writes ``docs/ref-config.md`` and ``docs/ref-site.md`` from the code: ``python docs/generate.py``.

``--check`` only compares.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import sys
import textwrap
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fedzo.config.plugins import LISTS, PLAIN, list_classes, plugin_classes
from fedzo.config.schema import LaunchConfig, RunSettings, SiteConfig
from fedzo.fl.config import SiteLimitsConfig
from fedzo.fl.messages import Refusal

FOLDER = Path(__file__).parent
HEAD = """\
# Configuration keys

<!-- Written by docs/generate.py from the config dataclasses; do not edit. -->

This page lists every key of a run, as written on the command line: `fedzo train fl.rounds=100 trainer=mezo`. The
[glossary](glossary.md) defines the terms. A config group is chosen by name (`trainer=mezo`) and has keys
`trainer.<key>`. A list of plugins is chosen in its order (`preprocess=[a,b]`), and plugin `a` has keys
`preprocess.a.<key>`. The defaults on this page are those of the code. Presets, the YAML files in `conf/`, may have
others.

`fedzo list` prints the presets. `fedzo train --help` prints the values of a command line. fedzo reports all unknown
keys, values of a wrong type and impossible combinations together, before any work is done.

An option has the keys of its group and keys of its own. An option that repeats a key of its group has another default
for the key.
"""


SITE_HEAD = """\
# The site file

<!-- Written by docs/generate.py from the config dataclasses and the refusals; do not edit. -->

A real client [site](glossary.md#site) has one YAML file of its own. The file holds the keys of the machine (`device`,
`threads`, `artifact_max_bytes`), of [`model`](ref-config.md#model), [`data`](ref-config.md#data) and
[`rewriter`](ref-config.md#rewriter), and the limits below. `rewriter` names its option in the key `plugin`. All keys
have defaults. An unknown key, a wrong value and an unknown name are errors, and the message lists what is allowed.

Only the site writes this file, and nothing in it leaves the site. A command line has no limits, since a simulation
needs none against itself.
"""
REFUSALS = """\
## Refusals

A site checks its limits when it registers for a run, before it loads the model, and again at each request. What the
server asks beyond them is refused with a number and a fixed sentence. The server's log and its error message show them:
`client 2 cannot take part: refusal 12, its site does not take part in this trainer. Its own log says why`. The site's
log says which key and which value of the file caused it. A number never changes its meaning.

A site whose stages fail (1, 37) is asked again after 10, 20, 40, ... seconds, and begins again with what they have
kept. Restart the site to be asked at once, and after a change of its environment or its file.

| number | sentence |
|---|---|
"""
NUMBERS = """\
## Numbers that stay at the site

`limits.answers` and `limits.min_rows` decide which numbers leave the site.

- A score over fewer rows than `min_rows` does not leave. A score leaves without the numbers that `answers` does not
  name.
- The table of classes (`per_class`) leaves as a whole or not at all. The table stays where one class has fewer than
  `min_rows` rows.
- The number of [held-out rows](glossary.md#held-out-row) is told as 0 where it is below `min_rows`.
- A site with fewer training rows than `min_rows` refuses to register (18). The same holds where a run asks for
  label counts (`fl.label_counts`) and one label has fewer rows than that.
- A site whose `answers` do not name `label_counts` refuses a run that asks for them (19).
- What preprocess stages tell leaves where `answers` is empty or names `stages`. The counts of a stage leave as a whole
  or not at all. All counts stay where one count, or the rest of the training rows, is above 0 and below `min_rows`.

The server takes the mean of each number over the clients that tell it. The report says how many did. The
[scalars](glossary.md#scalar) of training steps are what the method sends: no limit withholds them.
"""


def field_docs(cls: type) -> dict[str, str]:
    """The string literal under each field or enum member, own class first, then its bases."""
    docs: dict[str, str] = {}
    for owner in (c for c in cls.__mro__ if c is not object and c.__module__.startswith("fedzo")):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
        for before, after in pairwise(body):
            if (
                isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                target = (
                    before.target
                    if isinstance(before, ast.AnnAssign)
                    else before.targets[0]
                    if isinstance(before, ast.Assign)
                    else None
                )
                if isinstance(target, ast.Name):
                    docs.setdefault(target.id, " ".join(after.value.value.split()))
    return docs


def markdown(text: str) -> str:
    """reStructuredText literals to Markdown, safe inside a table."""
    return text.replace("``", "`").replace("|", "\\|")


def enum_of(hint: Any) -> type[Enum] | None:
    """The enum in an annotation, if it is one or an optional one."""
    found = [part for part in (hint, *get_args(hint)) if isinstance(part, type) and issubclass(part, Enum)]
    return found[0] if found else None


def type_name(hint: Any) -> str:
    """``list[str]`` as it is, ``str | None`` as "str or null", an enum as "choice"."""
    if enum_of(hint):
        return "choice"
    parts = [part for part in get_args(hint) if part is not type(None)]
    if type(None) in get_args(hint):
        return f"{type_name(parts[0])} or null"
    return str(hint) if parts else hint.__name__


def default_of(field: dataclasses.Field[Any]) -> str:
    """The default as one writes it on the command line."""
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if value is dataclasses.MISSING:
        return "required"
    return value.name if isinstance(value, Enum) else json.dumps(value)


def own_fields(cls: type) -> list[dataclasses.Field[Any]]:
    """Fields that the class itself states: new ones, and inherited ones with another default."""
    return [field for field in dataclasses.fields(cls) if field.name in vars(cls).get("__annotations__", {})]


def table(cls: type, prefix: str) -> list[str]:
    """Rows of the plain keys that the class itself states; nested dataclasses get sections of their own."""
    hints, docs, rows = get_type_hints(cls), field_docs(cls), []
    for field in own_fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) or (cls is RunSettings and field.name in LISTS):
            continue
        text = docs.get(field.name, "")
        if choice := enum_of(hint):
            meanings = field_docs(choice)
            names = [f"`{m.name}`" for m in choice]
            each = [f"{name}: {meanings[m.name]}" for name, m in zip(names, choice, strict=True) if m.name in meanings]
            text = " ".join([text, f"One of {', '.join(names)}.", *each]).strip()
        rows.append(f"| `{prefix}{field.name}` | {type_name(hint)} | `{default_of(field)}` | {markdown(text)} |")
    return ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else []


def summary(cls: type) -> str:
    """The class docstring's text as one paragraph."""
    return markdown(" ".join((cls.__doc__ or "").split()))


def group_page(name: str, base: type, options: dict[str, type]) -> list[str]:
    """The options of a group: the keys of all first, then those that some share, then each option's own."""
    shared: dict[type, list[str]] = {}
    for option, cls in sorted(options.items()):
        for parent in cls.__mro__[1:]:
            if issubclass(parent, base) and parent is not base and own_fields(parent):
                shared.setdefault(parent, []).append(option)
    lines = ["Keys of every option:", "", *rows] if (rows := table(base, f"{name}.")) else []
    for parent, users in shared.items():
        which = ", ".join(f"`{user}`" for user in users)
        lines += [f"### Keys that {which} share", "", summary(parent), "", *table(parent, f"{name}.")]
    for option, cls in sorted(options.items()):
        lines += [f"### `{name}={option}`", "", summary(cls), "", *table(cls, f"{name}.")]
    return lines


def list_page(name: str, options: dict[str, type]) -> list[str]:
    """The plugins that a list may hold, each with its keys."""
    chosen = json.dumps(list(getattr(LaunchConfig(), name))).replace('"', "")
    lines = [f"## `{name}`", "", f"A list of plugins, by default `{name}={chosen}`.", ""]
    for option, cls in sorted(options.items()):
        lines += [f"### `{name}=[{option}]`", "", summary(cls), "", *table(cls, f"{name}.{option}.")]
    return lines


def page() -> str:
    """The whole page."""
    plugins, lists = plugin_classes(), list_classes()
    lines = [HEAD, "## The run", "", summary(RunSettings), "", *table(RunSettings, "")]
    lines += ["## The machine", "", summary(SiteConfig), "", *table(SiteConfig, "")]
    of_run, of_site, of_launch = map(dataclasses.fields, (RunSettings, SiteConfig, LaunchConfig))
    before = {field.name for field in (*of_run, *of_site)}
    for field in (*of_run, *of_site, *(field for field in of_launch if field.name not in before)):
        cls = get_type_hints(LaunchConfig)[field.name]
        if field.name in lists:
            lines += list_page(field.name, lists[field.name])
        if not dataclasses.is_dataclass(cls):
            continue
        name = field.name
        lines += [f"## `{name}`", "", summary(cls), ""]
        if name not in plugins:
            chosen = f"A config group: `{name}=<preset>` takes `conf/{name}/<preset>.yaml`." if name in PLAIN else ""
            lines += [*([chosen, ""] if chosen else []), *table(cls, f"{name}.")]
            continue
        lines += group_page(name, cls, plugins[name])
    return "\n".join(lines).rstrip() + "\n"


def site_page() -> str:
    """The page of the site file: its limits, and the numbers of refusals."""
    limits = ["## `limits`", "", summary(SiteLimitsConfig), "", *table(SiteLimitsConfig, "limits.")]
    refusals = [f"| {refusal} | {refusal.sentence} |" for refusal in Refusal if refusal]
    return "\n".join([SITE_HEAD, *limits, NUMBERS, REFUSALS + "\n".join(refusals)]) + "\n"


def main() -> int:
    """Write the pages, or with ``--check`` return 1 where one is not up to date."""
    stale = 0
    for name, text in (("ref-config.md", page()), ("ref-site.md", site_page())):
        file = FOLDER / name
        if "--check" not in sys.argv[1:]:
            file.write_text(text, encoding="utf-8")
        elif not file.is_file() or file.read_text(encoding="utf-8") != text:
            sys.stderr.write(f"{name} is not what the code says. Run: python docs/generate.py\n")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
