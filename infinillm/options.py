"""How a frozen dataclass is read from a file, the environment and flags, in that order, and written as flags again."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from infinillm.errors import BadRequest

Settings = TypeVar("Settings")
Sections = Mapping[str, type[Any]]  # the name of a process, and its dataclass


def option(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
    besides: Mapping[str, str] = {},
    positional: bool = False,
    also: tuple[str, ...] = (),
) -> Any:
    """A field with its default, what it means (with its unit), what it may be, and other flags that set it.

    `besides` are more choices: what people are told of one, and the pattern of all that it stands for.
    """
    about = {"text": text, "least": least, "most": most, "choices": choices, "positional": positional, "also": also}
    return field(default=default, metadata={**about, "besides": besides})


# Where each value came from, by field name: "file", "environment" or "flag"; what is not named is a default.
def sources() -> Any:
    return field(default_factory=dict, repr=False, compare=False, metadata={"text": ""})


def options(cls: type[Any]) -> tuple[dataclasses.Field[Any], ...]:
    """The fields of a process that people may set."""
    return tuple(each for each in dataclasses.fields(cls) if each.name != "sources")


def kind_of(each: dataclasses.Field[Any]) -> type[Any]:
    return type(each.default)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check(settings: Any) -> None:
    """Refuse a value of the wrong type or outside its bounds, by name."""
    for each in options(type(settings)):
        value: Any = getattr(settings, each.name)
        about = each.metadata
        shown = "MODEL" if about["positional"] else flag(each.name)
        kind = kind_of(each)
        if kind is float and type(value) is int:
            object.__setattr__(settings, each.name, value := float(value))
        if type(value) is not kind:
            raise BadRequest(f"{shown} must be {_KINDS[kind]}, not {value!r}", field=each.name)
        if about["choices"] and value not in about["choices"] and not _fits(value, about["besides"].values()):
            known = ", ".join((*about["choices"], *about["besides"]))
            raise BadRequest(f"{shown} must be one of {known}, not {value!r}", field=each.name)
        least, most = about["least"], about["most"]
        if least is not None and not (math.isfinite(value) and least <= value <= most):
            raise BadRequest(f"{shown} must be between {least:.12g} and {most:.12g}, not {value!r}", field=each.name)


def _fits(value: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, value) for pattern in patterns)


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_TRUTH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _value(each: dataclasses.Field[Any], text: str, shown: str) -> Any:
    kind = kind_of(each)
    try:
        return _TRUTH[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise BadRequest(f"{shown} must be {_KINDS[kind]}, not {text!r}", field=each.name) from None


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are BadRequest, with the flag that was meant where one is near."""

    def error(self, message: str) -> Any:
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0] if "unrecognized" in message else ""
        near = difflib.get_close_matches(unknown.split("=")[0], self._option_string_actions, n=1) if unknown else []
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadRequest(f"{message}{hint} (see `{self.prog} --help`)", field=unknown or None)


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that keeps our line breaks and gives every flag room."""

    WIDTH: ClassVar[int] = 110

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=self.WIDTH)


def parser(cls: type[Any], prog: str, *, description: str = "", examples: str = "") -> Parser:
    """The flags of a process, each with its meaning, bounds and default, made from its fields."""
    found = Parser(
        prog=prog,
        description=description or cls.__doc__,
        epilog=examples,
        formatter_class=Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for each in options(cls):
        about = each.metadata
        default = "" if each.default in ("", False) else f" (default: {each.default})"
        text = (about["text"] + default).replace("%", "%%")
        kind = kind_of(each)
        if about["positional"]:
            found.add_argument(each.name, nargs="?", metavar=each.name.upper(), help=text)
        elif kind is bool:
            found.add_argument(flag(each.name), action=argparse.BooleanOptionalAction, help=text)
        else:
            choices = "{" + ",".join((*about["choices"], *about["besides"])) + "}" if about["choices"] else ""
            metavar = choices or {int: "N", float: "X", str: "TEXT"}[kind]
            found.add_argument(flag(each.name), *about["also"], dest=each.name, metavar=metavar, help=text)
    found.add_argument(
        "--config", metavar="FILE", help="YAML with a section per process, such as `worker: {kv_blocks: 256}`"
    )
    return found


def load(
    cls: type[Settings],
    sections: Sections,
    argv: Sequence[str],
    environ: Mapping[str, str],
    file: str | Path | None = None,
    *,
    prog: str = "",
    description: str = "",
    examples: str = "",
) -> Settings:
    """Read one process's settings: file < environment < flags. Raises BadRequest naming what is wrong."""
    section = next(name for name, each in sections.items() if each is cls)
    known = {each.name: each for each in options(cls)}
    flags_of = parser(cls, prog or f"infinillm {section}", description=description, examples=examples)
    flags = vars(flags_of.parse_args(list(argv)))
    found: dict[str, tuple[Any, str]] = {}
    if path := flags.pop("config", file):
        found |= {name: (value, "file") for name, value in _read(Path(path), section, sections).items()}
    _refuse_unknown(environ, sections)
    for name, each in known.items():
        variable = f"INFINILLM_{section}_{name}".upper()
        if variable in environ:
            found[name] = (_value(each, environ[variable], variable), "environment")
    for name, text in flags.items():
        shown = "MODEL" if known[name].metadata["positional"] else flag(name)
        found[name] = (text if isinstance(text, bool) else _value(known[name], text, shown), "flag")
    values = {name: value for name, (value, _) in found.items()}
    make: Any = cls
    made: Settings = make(**values, sources={name: source for name, (_, source) in found.items()})
    return made


def _read(path: Path, section: str, sections: Sections) -> dict[str, Any]:
    """One process's section of a settings file, with every section's keys checked."""
    try:
        whole = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadRequest(f"--config {path}: {error.strerror}", field="config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadRequest(f"--config {path} is not YAML: {str(error).splitlines()[0]}", field="config") from None
    for name, keys in _mapping(whole, path, "the file").items():
        if name not in sections:
            raise BadRequest(f"{path}: unknown section {name!r}; known are {', '.join(sections)}", field=str(name))
        names = [each.name for each in options(sections[name])]
        for key in _mapping(keys, path, f"section {name!r}"):
            if str(key).replace("-", "_") not in names:
                raise BadRequest(f"{path}: unknown key {key!r} in {name!r}{_near(str(key), names)}", field=str(key))
    return {str(key).replace("-", "_"): value for key, value in ((whole or {}).get(section) or {}).items()}


def _mapping(value: Any, path: Path, what: str) -> dict[Any, Any]:
    if value is not None and not isinstance(value, dict):
        raise BadRequest(f"{path}: {what} must map names to values, not {value!r:.40}", field="config")
    return value or {}


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _refuse_unknown(environ: Mapping[str, str], sections: Sections) -> None:
    names = [f"INFINILLM_{section}_{each.name}".upper() for section, cls in sections.items() for each in options(cls)]
    for variable in environ:
        if variable.startswith("INFINILLM_") and variable not in names:
            raise BadRequest(f"unknown environment variable {variable}{_near(variable, names)}", field=variable)


def arguments(settings: Any) -> list[str]:
    """The flags that `load` turns back into `settings`."""
    given: list[str] = []
    for each in options(type(settings)):
        value = getattr(settings, each.name)
        if value == each.default or each.metadata["positional"]:
            continue
        given += [flag(each.name)] if value is True else [f"{flag(each.name)}={value}"]
    positional = [getattr(settings, each.name) for each in options(type(settings)) if each.metadata["positional"]]
    return [*given, *(["--", *positional] if any(positional) else [])]


def explain(settings: Any) -> str:
    """Every setting with its value and where it came from, one a line."""
    rows = [(each.name, getattr(settings, each.name)) for each in options(type(settings))]
    return "\n".join(f"{name:24} {value!r:24} {settings.sources.get(name, 'default')}" for name, value in rows)
