"""Writes the generated parts of ``docs/ref-config.md`` and ``docs/ref-site.md``: ``python docs/generate.py``.

``--check`` only compares.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
import textwrap
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from fedzo.config.plugins import LISTS, PLAIN, list_classes, plugin_classes
from fedzo.config.schema import LaunchConfig, RunSettings, SiteConfig
from fedzo.fl.config import SiteLimitsConfig
from fedzo.fl.messages import Refusal

FOLDER = Path(__file__).parent
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- /generated -->\n)", re.DOTALL)
"""What this script writes of a page: the part's name, and what lies between the marks. The rest is written by hand."""


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
    """``list[str]`` as it is, ``str | None`` as "str or null", an enum as "choice", several of one as "list"."""
    if enum_of(hint):
        return "list" if get_origin(hint) is list else "choice"
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
            how = "Some" if get_origin(hint) is list else "One"
            text = " ".join([text, f"{how} of {', '.join(names)}.", *each]).strip()
        rows.append(f"| `{prefix}{field.name}` | {type_name(hint)} | `{default_of(field)}` | {markdown(text)} |")
    return ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else []


def summary(cls: type) -> str:
    """The class docstring's text as one paragraph, in lines of at most 120 characters."""
    return textwrap.fill(markdown(" ".join((cls.__doc__ or "").split())), 120, break_on_hyphens=False)


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


def keys() -> list[str]:
    """All keys of a run, group by group."""
    plugins, lists = plugin_classes(), list_classes()
    lines = ["## The run", "", summary(RunSettings), "", *table(RunSettings, "")]
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
    return lines


def limits() -> list[str]:
    """The keys of a site alone."""
    return [summary(SiteLimitsConfig), "", *table(SiteLimitsConfig, "limits.")]


def refusals() -> list[str]:
    """What a site says to a server."""
    told = [f"| {refusal} | {refusal.sentence} |" for refusal in Refusal if refusal]
    return ["| number | sentence |", "|---|---|", *told]


PARTS = {"keys": keys, "limits": limits, "refusals": refusals}


def filled(text: str) -> str:
    """The page with every generated part made anew."""

    def fill(found: re.Match[str]) -> str:
        return found[1] + "\n" + "\n".join(PARTS[found[2]]()).rstrip() + "\n\n" + found[3]

    return BLOCK.sub(fill, text)


def main() -> int:
    """Write the pages, or with ``--check`` return 1 where one is not up to date."""
    stale = 0
    for file in (FOLDER / "ref-config.md", FOLDER / "ref-site.md"):
        before = file.read_text(encoding="utf-8")
        if "--check" not in sys.argv[1:]:
            file.write_text(filled(before), encoding="utf-8")
        elif filled(before) != before:
            sys.stderr.write(f"{file.name} is not what the code says. Run: python docs/generate.py\n")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
