"""The command line: preset, then YAML files, then flags, into one checked `Config`.

jsonargparse types each value and prints the help; merging is done here, because the source of each
value is kept. Knows nothing of torch. Next file: `deepspeed_config.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import jsonargparse
import yaml  # type: ignore[import-untyped]

from megagpt.config.command import UsageError
from megagpt.config.deepspeed_config import DEFAULT_DS_CONFIG
from megagpt.config.deepspeed_json import read_ds_config
from megagpt.config.dotted_keys import Setting, did_you_mean, leaves
from megagpt.config.presets import PRESETS
from megagpt.config.refusals import refuse_settings
from megagpt.config.schema import Config
from megagpt.config.yaml_text import alternatives, fit, parse_yaml, read_yaml

_VALUE_OPTIONS = ("config", "preset", "ds_config", "local_rank", "local-rank")
_SWITCHES = ("print_config", "help")
_SETTINGS: dict[str, Setting] = leaves(Config)
_SECTIONS = sorted({key.rpartition(".")[0] for key in _SETTINGS} - {""})


@lru_cache(maxsize=1)
def build_parser() -> jsonargparse.ArgumentParser:
    """The parser of one flag for every setting; it types values and prints the help."""
    parser = jsonargparse.ArgumentParser(
        prog="megagpt train",
        usage="%(prog)s [--config RUN.yaml] [--ds_config DS.json] [--preset NAME] "
        "[--SECTION.KEY VALUE ...]",
        description="Settings: preset, then YAML files in order, then flags; the last one wins.",
        exit_on_error=False,
    )
    parser.add_argument("--config", metavar="RUN.yaml", help="YAML file of settings; repeatable")
    parser.add_argument("--preset", choices=list(PRESETS), help="model shape to start from")
    parser.add_argument("--ds_config", metavar="DS.json", help="DeepSpeed JSON; default ZeRO-1")
    parser.add_argument(
        "--print_config", action="store_true", help="print the resolved YAML and stop"
    )
    groups: dict[str, Any] = {"": parser}
    for key, setting in _SETTINGS.items():
        section = key.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        # argparse takes % as a format.
        groups[section].add_argument(
            f"--{key}",
            type=setting.type,
            default=setting.default,
            help=setting.help.replace("%", "%%"),
        )
    return parser


def parse_config(argv: list[str]) -> tuple[Config, dict[str, Any], dict[str, str]]:
    """Reads a command line.

    Args:
        argv: Arguments without the program's name.

    Returns:
        The configuration; the DeepSpeed JSON as it was written (ZeRO-1 if none was named); the
        source of each dotted key: `default`, `preset NAME`, `file PATH` or `flag --KEY`. Under
        `ds_config` the sources hold the path of the JSON.

    Raises:
        UsageError: An unknown flag, a flag without value, a value of the wrong type.
        ValueError: A wrong key or value in a file, or settings that do not fit together.
        SystemExit: After `--help` and `--print_config`.
    """
    options = _split_arguments(argv)
    given = dict(options)  # the last of each
    if "help" in given:
        build_parser().print_help()
        raise SystemExit(0)
    values: dict[str, Any] = {}
    sources = dict.fromkeys(_SETTINGS, "default")

    def merge(layer: Mapping[str, Any], source: str) -> None:
        values.update(layer)
        sources.update(dict.fromkeys(layer, source))

    for _, name in (o for o in options if o[0] == "preset"):
        if name not in PRESETS:
            raise UsageError(f"unknown preset '{name}'; choose one of {', '.join(PRESETS)}")
        shape = dataclasses.asdict(PRESETS[name])
        merge({f"model.{k}": v for k, v in shape.items()}, f"preset {name}")
    for _, path in (o for o in options if o[0] == "config"):
        merge(_settings(_sections_of(path), where=path), f"file {path}")
    for key, text in (o for o in options if o[0] in sources):
        merge({key: _of_flag(key, text)}, f"flag --{key}")
    config = _build(values)
    if "print_config" in given:
        print(yaml.safe_dump(config_to_dict(config), sort_keys=False), end="")
        raise SystemExit(0)
    ds_config_path = given.get("ds_config")
    sources["ds_config"] = ds_config_path or "default"
    ds_config = read_ds_config(ds_config_path) if ds_config_path else dict(DEFAULT_DS_CONFIG)
    return config, ds_config, sources


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values, fit for YAML and JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of `config_to_dict`; absent keys take their defaults.

    Raises:
        ValueError: An unknown key, a value of the wrong type, or settings that do not fit together.
    """
    return _build(_settings(values, where="the saved configuration"))


def _split_arguments(argv: list[str]) -> list[tuple[str, str]]:
    """Pairs of name and text; a switch has an empty text."""
    known = [*_SETTINGS, *_VALUE_OPTIONS, *_SWITCHES]
    pairs: list[tuple[str, str]] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument == "-h":
            argument = "--help"
        name, equals, text = argument[2:].partition("=")
        if not argument.startswith("--"):
            raise UsageError(
                f"unexpected argument '{argument}'; give settings as --section.key VALUE"
            )
        if name not in known:
            hint = did_you_mean(name, known, "--") or "; --help lists all flags"
            raise UsageError(f"unknown flag '--{name}'{hint}")
        if name in _SWITCHES:
            if equals:
                raise UsageError(f"--{name} takes no value; write it without '={text}'")
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"--{name} has no value; give one after it")
            text = rest.pop(0)
        pairs.append((name, text))
    return pairs


def _sections_of(path: str) -> Mapping[str, Any]:
    values = read_yaml(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds a {type(values).__name__}, not sections of settings; "
            "write 'model:' and its keys below"
        )
    return values


def _settings(values: Mapping[Any, Any], *, where: str) -> dict[str, Any]:
    """The settings of a file by dotted key, in the types of the schema.

    Raises:
        ValueError: For an unknown key, with the nearest name, a section that is not one, or a value
            of the wrong type.
    """
    flat: dict[str, Any] = {}
    for key, value in leaves(values, sections=_SECTIONS).items():
        if key in _SETTINGS:
            flat[key] = value
        elif key in _SECTIONS:
            if value is not None:
                raise ValueError(
                    f"section '{key}' in {where} is {value!r}, not keys with values; "
                    f"write '{key}:' and its keys below"
                )
        elif isinstance(value, Mapping) and "." not in key:
            hint = did_you_mean(key, _SECTIONS) or f"; the sections are {', '.join(_SECTIONS)}"
            raise ValueError(f"unknown section '{key}' in {where}{hint}")
        else:
            hint = did_you_mean(key, _SETTINGS) or "; --help lists all keys"
            raise ValueError(f"unknown key '{key}' in {where}{hint}")
    parse = build_parser().parse_object
    return {
        key: _typed(key, partial(parse, {key: fit(value, _SETTINGS[key].type)}), value, where)
        for key, value in flat.items()
    }


def _of_flag(key: str, text: str) -> Any:
    """The value of a flag; lists and mappings are written as in YAML."""
    parser, flag = build_parser(), f"--{key}"
    try:
        if text.lstrip()[:1] in ("[", "{"):
            value = fit(parse_yaml(text, where=flag), _SETTINGS[key].type)
            return _typed(key, partial(parser.parse_object, {key: value}), text, flag)
        return _typed(key, partial(parser.parse_args, [f"{flag}={text}"]), text, flag)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _typed(key: str, parse: Callable[..., Any], given: Any, where: str) -> Any:
    """The value of a key that the parser finds, which must be of its type, finite and no giant.

    Args:
        key: The setting.
        parse: Gives the settings that it finds.
        given: What stands there, for the message.
        where: In which file, or behind which flag.
    """
    kind = _SETTINGS[key].type
    wanted = f"give {_describe(kind, given)}"
    if where.startswith("--"):
        shown = f"{where}={_shortened(given)}"
    else:
        shown = f"{key}={_shortened(repr(given))} in {where}"
    if given == "" or (given is None and type(None) not in alternatives(kind)):
        raise ValueError(f"{key} has nothing behind it in {where}; {wanted}, or leave the key out")
    try:
        value = parse(defaults=False)[key]
    except (jsonargparse.ArgumentError, ValueError):
        raise ValueError(f"{shown} has the wrong type; {wanted}") from None
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{shown} is not finite; {wanted}")
        if isinstance(number, int) and not -(2**63) <= number < 2**63:
            raise ValueError(f"{shown} does not fit into 64 bits; give a smaller number")
    return value


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:60]}... ({len(text)} characters)"


def _describe(kind: Any, given: Any = None) -> str:
    """What to write for a type, with an example, in words."""
    options = alternatives(kind)
    if len(options) > 1:
        return " or ".join(_describe(each, given) for each in options)
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    is_short = isinstance(given, str) and len(given) < 80
    return _example(kind, given if is_short else "one")


def _example(kind: Any, item: str) -> str:
    examples: dict[Any, str] = {
        type(None): "null",
        int: "a whole number such as 8",
        float: "a finite number such as 0.1",
        bool: "true or false",
        str: "text such as runs/one",
        tuple[float, float]: "2 numbers such as [0.9, 0.95]",
        list[str]: f"a list such as [{item}]",
        dict[str, float]: "weights such as {one: 0.7, two: 0.3}",
        dict[str, str]: "names such as {one: data/one, two: data/two}",
    }
    return examples[kind]


def _build(flat: Mapping[str, Any]) -> Config:
    """Constructs the sections, which check themselves, and refuses what they cannot be together."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = value
    types = typing.get_type_hints(Config)
    built = {s: types[s](**values) for s, values in sections.items() if s}
    config = Config(**built, **sections.get("", {}))
    refuse_settings(config)
    return config
