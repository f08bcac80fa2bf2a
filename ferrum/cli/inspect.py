"""`inspect`: what is in a model file, and what an engine with the given options would take, without loading it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sized
from typing import TYPE_CHECKING, Any

from ferrum.cli.arguments import Parser, given_settings
from ferrum.cli.output import BOLD, json_line, note_error, printable, program, size, styled
from ferrum.errors import ModelFileError, OutOfMemory
from ferrum.options import DEFAULT, DEFAULT_MODEL, ENVIRONMENT, GIVEN, EngineOptions, Resolved, available_memory, resolve, variable_name

if TYPE_CHECKING:
    from ferrum.gguf_file import GGUFFile

_USAGE = "[-m MODEL.gguf] [--json] [options]"
_DESCRIPTION = """\
Show a model file: architecture, shapes, quant types, vocabulary, template, the
options in force and where each comes from, and the memory plan for them. Only
the file's header is read, so this is quick for a file of any size.

Exit code: 0, 1 if the model cannot run (the reason comes last), 2 wrong usage."""
_EXAMPLES = """\
  {program} inspect
  {program} inspect -m Qwen3-30B-A3B-Q4_K_M.gguf --kv-tokens 32768
  {program} inspect --json | jq .plan.total_bytes"""


def parser() -> Parser:
    parser = Parser("inspect", _USAGE, _DESCRIPTION, _EXAMPLES.format(program=program()))
    parser.add_engine()
    parser.add_output("print everything as one line of JSON; sizes in bytes")
    return parser


def run(arguments: argparse.Namespace) -> int:
    from ferrum.gguf_file import GGUFFile

    resolved = resolve(arguments.model, given_settings(arguments, EngineOptions))
    report = describe(GGUFFile.open(resolved.model), resolved)
    if arguments.json:
        print(json_line(report))
    else:
        for title, rows in _sections(report):
            print(styled(title, BOLD, sys.stdout))
            for name, value in rows:
                print(printable(f"  {name:<21} {value}".rstrip()))
    if not report["reason"]:
        return 0
    if not arguments.json:
        sys.stdout.flush()
        note_error(report["reason"])
    return 1


def describe(file: GGUFFile, resolved: Resolved) -> dict[str, Any]:
    """Everything that `inspect` shows, fit for JSON. `reason` says why the model cannot run, else it is None."""
    from ferrum_native._native import plan

    planned, reason = None, None
    try:
        planned = plan(file, **resolved.options.arguments())
    except ModelFileError as error:
        reason = str(error)
    except OutOfMemory as error:  # what it would take without the budget
        reason = str(error)
        planned = plan(file, **resolved.options.arguments() | {"memory_budget": None})
        planned["options"]["memory_budget"] = resolved.options.memory_budget
    vocabulary = _vocabulary(file)
    effective = planned["options"] if planned else resolved.options.arguments()
    return {
        "model": resolved.model,
        "model_source": _source("model", resolved),
        "files": len(file.paths),
        "file_bytes": file.file_bytes,
        "gguf_version": file.version,
        "architecture": file.metadata.get("general.architecture"),
        "name": file.metadata.get("general.name"),
        "device": planned["device"] if planned else None,
        "config": _plain(planned["config"] if planned else _shapes(file)),
        "tensor_types": _tensor_types(file),
        "vocabulary": vocabulary,
        "chat_template": file.metadata.get("tokenizer.chat_template"),
        "options": {name: {"value": value, "source": _source(name, resolved)} for name, value in _plain(effective).items()},
        "plan": {name: value for name, value in planned.items() if name.endswith(("_bytes", "_token"))} if planned else None,
        "available_memory_bytes": available_memory(),
        "reason": reason or vocabulary.get("error"),
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Only what JSON can hold."""
    return {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str, type(None)))}


def _shapes(file: GGUFFile) -> dict[str, Any]:
    """The architecture's own metadata, for a model that the engine does not take."""
    prefix = f"{file.metadata.get('general.architecture')}."
    return {key[len(prefix):]: value for key, value in file.metadata.items() if key.startswith(prefix)}


def _tensor_types(file: GGUFFile) -> list[dict[str, Any]]:
    """Count, bytes and an example of each tensor type, most bytes first."""
    types: dict[str, dict[str, Any]] = {}
    for tensor in file.tensors.values():
        row = types.setdefault(tensor.type_name, {"type": tensor.type_name, "tensors": 0, "bytes": 0, "example": tensor.name})
        row["tensors"] += 1
        row["bytes"] += tensor.nbytes
    return sorted(types.values(), key=lambda row: (-row["bytes"], row["type"]))


def _vocabulary(file: GGUFFile) -> dict[str, Any]:
    from ferrum.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.from_gguf(file)
    except ModelFileError as error:
        tokens = file.metadata.get("tokenizer.ggml.tokens")
        return {"size": len(tokens) if isinstance(tokens, Sized) else None, "error": str(error)}
    special = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "eot": tokenizer.eot_id, "padding": tokenizer.pad_id}
    named = {name: id for name, id in special.items() if id is not None}
    return {
        "size": tokenizer.vocab_size,
        "special_ids": named,
        "stop_ids": sorted(tokenizer.stop_ids),
        "control": len(tokenizer.control_ids),
        "unused": len(tokenizer.unused_ids),
        "add_bos": tokenizer.add_bos,
        "texts": {str(id): tokenizer.token_text(id) for id in sorted({*tokenizer.stop_ids, *named.values()})},
    }


def _source(name: str, resolved: Resolved) -> str:
    """Where a value comes from: "flag", the environment variable, or "default"."""
    return {GIVEN: "flag", ENVIRONMENT: variable_name(name), DEFAULT: "default"}[resolved.sources.get(name, DEFAULT)]


def _sections(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The report as titles with rows of (name, value)."""
    files = "1 file" if report["files"] == 1 else f"{report['files']} files"
    sections = [
        ("model", [
            ("path", _path(report["model"])),
            ("chosen by", _chosen_by(report["model_source"])),
            ("file", f"{size(report['file_bytes'])}, {files}, GGUF version {report['gguf_version']}"),
            ("name", report["name"] or "not named"),
            ("runs on", report["device"] or "nothing: the reason comes last"),
        ]),
        ("shapes", [(name, _shown(value)) for name, value in report["config"].items()]),
        ("tensors", [(row["type"], _tensors(row)) for row in report["tensor_types"]]),
        ("vocabulary", _vocabulary_rows(report["vocabulary"])),
        ("chat template", _template_rows(report["chat_template"])),
        ("options", [(name, f"{_option(name, row['value']):<12}({row['source']})") for name, row in report["options"].items()]),
    ]
    if report["plan"]:
        sections.append(("memory plan", _plan_rows(report)))
    return sections


def _path(path: str) -> str:
    """A model's path with ~ for the home; that of the demo model, which nobody types, may lose its beginning."""
    home = os.path.join(os.path.expanduser("~"), "")
    shown = os.path.join("~", path[len(home):]) if len(home) > 1 and path.startswith(home) else path
    if path == DEFAULT_MODEL and len(shown) > 56:
        return os.path.join("...", *path.split(os.sep)[-3:])
    return shown


def _chosen_by(source: str) -> str:
    return "default: the demo model of this package" if source == "default" else source


def _shown(value: Any, none: str = "not decided") -> str:
    if isinstance(value, float):
        return f"{value:.7g}"
    return none if value is None else str(value)


def _option(name: str, value: Any) -> str:
    if name == "memory_budget":
        return "none" if value is None else size(value)
    return _shown(value)


def _tensors(row: dict[str, Any]) -> str:
    noun = "tensor " if row["tensors"] == 1 else "tensors"
    return f"{row['tensors']:>6} {noun} {size(row['bytes']):>11}"


def _vocabulary_rows(vocabulary: dict[str, Any]) -> list[tuple[str, str]]:
    if "error" in vocabulary:
        return [("size", _shown(vocabulary["size"], "unknown")), ("not readable", vocabulary["error"])]

    def named(id: int) -> str:
        return f"{id} {vocabulary['texts'][str(id)]}"

    return [
        ("size", f"{vocabulary['size']} ({vocabulary['control']} control tokens, {vocabulary['unused']} unused)"),
        *((name, named(id)) for name, id in vocabulary["special_ids"].items()),
        ("text ends at", ", ".join(named(id) for id in vocabulary["stop_ids"])),
        ("add_bos", str(vocabulary["add_bos"])),
    ]


def _template_rows(template: Any) -> list[tuple[str, str]]:
    if not isinstance(template, str):
        return [("none", "")]
    first = template.splitlines()[0] if template else ""
    return [("length", f"{len(template)} characters"), ("starts", first if len(first) <= 54 else first[:51] + "...")]


def _why(report: dict[str, Any], tokens: int) -> str:
    """What the default of kv_tokens came from: the model's context, 8192, or what fits."""
    if report["options"]["kv_tokens"]["source"] != "default":
        return ""
    if tokens >= report["config"]["context_length"]:
        return ": the context"
    return ": the default" if tokens == 8192 else ": what fits"


def _plan_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    plan = report["plan"]
    tokens, available = report["options"]["kv_tokens"]["value"], report["available_memory_bytes"]
    rows = [
        ("weights", plan["weights_bytes"], "in place over the file"),
        ("weight copies", plan["weights_extra_bytes"], "made by the device"),
        ("KV cache", plan["kv_bytes"], f"{tokens} tokens of {plan['kv_bytes_per_token']} bytes{_why(report, tokens)}"),
        ("scratch", plan["scratch_bytes"], ""),
        ("total", plan["total_bytes"], ""),
    ]
    if available is not None:
        fits = "" if plan["total_bytes"] <= available else "less than the total: lower --kv-tokens"
        rows.append(("available memory", available, fits))
    return [(name, f"{size(nbytes):>11}  {about}") for name, nbytes, about in rows]
