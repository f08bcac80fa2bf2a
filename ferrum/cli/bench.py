"""`bench`: how fast a model runs on this machine, beside what its memory would allow."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from ferrum.benchmark import BatchReport, BenchParams, BenchReport, benchmark
from ferrum.cli.arguments import Parser, add_settings, given_settings
from ferrum.cli.output import BOLD, ProgressLine, json_line, note_error, printable, program, size, styled
from ferrum.cli.profile_table import profile_lines
from ferrum.cli.running import log_to_stderr
from ferrum.options import EngineOptions

_USAGE = "[-m MODEL.gguf] [--batch N,N,...] [options]"
_DESCRIPTION = """\
Measure how fast a model runs here: its start, reading prompts (prefill) and
generating (decode), for several numbers of sequences that run together. Every
sequence has a different random prompt and runs as those of a program do.

Decode is shown beside its bound: a step must read the weights that its tokens
use and their keys and values, and memory has a speed, which is measured too.
On the CPU every sequence must generate the same ids as it does alone.

Exit code: 0, 1 error or wrong ids, 2 wrong usage, 130 ended by Ctrl-C."""
_EXAMPLES = """\
  {program} bench
  {program} bench -m Qwen3-30B-A3B-Q4_K_M.gguf --batch 1,8 --repeat 5
  {program} bench --batch 1 --context 1500 --gen-tokens 64
  {program} bench --batch 1,16 --profile
  {program} bench --json | jq '.runs[] | [.batch, .decode_tok_s]'

The KV cache (--kv-tokens) and the number of sequences are what the runs need,
unless you give them. Timings of a machine that does other work vary: trust
medians of many rounds, and look at the least and the most."""


def parser() -> Parser:
    parser = Parser("bench", _USAGE, _DESCRIPTION, _EXAMPLES.format(program=program()))
    add_settings(parser.add_argument_group("measurement"), BenchParams)
    parser.add_engine()
    parser.add_output("print everything as one line of JSON; sizes in bytes, times in seconds")
    return parser


def run(arguments: argparse.Namespace) -> int:
    params = BenchParams(**given_settings(arguments, BenchParams))
    options = given_settings(arguments, EngineOptions)
    log_to_stderr()
    with ProgressLine() as line:
        report = benchmark(arguments.model, params, progress=line.show, **options)
    if arguments.json:
        print(json_line(asdict(report)))
    else:
        _show(report, params)
    sys.stdout.flush()
    for run in report.runs:
        if run.mismatch:
            note_error(f"Batch {run.batch}: {run.mismatch}. On the CPU both must be equal: please report this.")
    return 1 if report.ids_ok is False else 0


def _show(report: BenchReport, params: BenchParams) -> None:
    for name, value in _about(report):
        print(printable(f"{name:<12}{value}"))
    print(f"\n{_what(params)}\n")
    print(styled(_TITLES, BOLD, sys.stdout))
    for run in report.runs:
        print(_row(run))
    print(f"\n{_legend(report)}")
    if report.profile:
        for line in ["", *profile_lines(report.profile, report.memory_bandwidth_gb_s * 1e9, report.product_rate_gmac_s and report.product_rate_gmac_s * 1e9)]:
            print(line)


def _about(report: BenchReport) -> list[tuple[str, str]]:
    model = report.model
    parts = []
    if report.rss_file_bytes is not None and report.rss_anon_bytes is not None:
        parts.append(f"{size(report.rss_file_bytes)} of files, {size(report.rss_anon_bytes)} of its own, ")
    return [
        ("model", model if len(model) < 68 else "..." + model[-64:]),
        ("runs on", report.device),
        ("start", f"loaded in {report.load_s:.2f} s; first token {report.first_token_s:.2f} s after the start of a process"),
        ("memory", f"{''.join(parts)}peak {size(report.peak_rss_bytes)}"),
        *([] if report.rss_file_huge_bytes is None else [("pages", f"{_huge_share(report):.0%} of those of files are huge")]),
        ("bandwidth", f"{report.memory_bandwidth_gb_s:.1f} GB/s, measured between the rounds"),
        *([] if report.product_rate_gmac_s is None else [("products", f"{report.product_rate_gmac_s:.0f} GMAC/s with Q4_K weights in the cache")]),
    ]


_SMALL_PAGES = ("The model file is cached in small pages, which costs decode 5 to 10%. If it fits\n"
                "into memory and the kernel has huge pages for files, forget it to read it anew:\n"
                "dd of=MODEL.gguf oflag=nocache conv=notrunc,fdatasync count=0\n")


def _huge_share(report: BenchReport) -> float:
    return (report.rss_file_huge_bytes or 0) / max(report.rss_file_bytes or 0, 1)


def _pages_are_small(report: BenchReport) -> bool:
    """Whether that matters: a small model is read from the processor's cache."""
    return report.rss_file_huge_bytes is not None and (report.rss_file_bytes or 0) > 1 << 30 and _huge_share(report) < 0.9


_TITLES = f"{'batch':>5}  {'prefill':>7} {'':<13}{'decode':>8} {'':<13}{'bound':>7}{'reached':>8}{'GB/s':>6}{'experts':>8}"


def _what(params: BenchParams) -> str:
    rounds = "1 round" if params.repeat == 1 else f"median of {params.repeat} rounds (least-most)"
    prompt, depth = _tokens(params.prompt_tokens), _tokens(params.depth)
    steps = "1 decode step" if params.gen_tokens == 1 else f"{params.gen_tokens} decode steps"
    return (f"Prompts of {prompt}; {steps} from {depth} in the cache.\n"
            f"Tokens/s of all sequences together, {rounds}.")


def _row(run: BatchReport) -> str:
    prefill, decode = _spread(run.prefill_tok_s_range), _spread(run.decode_tok_s_range)
    return (f"{run.batch:>5}  {_rate(run.prefill_tok_s):>7} {prefill:<13}{_rate(run.decode_tok_s):>8} {decode:<13}{_rate(run.bound_tok_s):>7}"
            f"{run.decode_tok_s / run.bound_tok_s:>8.0%}{run.decode_gb_s:>6.1f}{run.distinct_experts:>8.1f}")


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _rate(tok_s: float) -> str:
    return f"{tok_s:.0f}" if tok_s >= 100 else f"{tok_s:.1f}"


def _spread(limits: tuple[float, float]) -> str:
    return f"({_rate(limits[0])}-{_rate(limits[1])})" if limits[0] < limits[1] else ""


def _legend(report: BenchReport) -> str:
    checked = {True: "Every sequence generated the ids that it does alone.", False: "WRONG IDS: see below.",
               None: "Ids were not compared with single runs: only the CPU promises equal ones."}[report.ids_ok]
    return ("bound: decode if a step read its bytes at the bandwidth, and took no time else.\n"
            "GB/s: the bytes that decode read; experts: of a layer, expected in a step.\n"
            f"{_SMALL_PAGES if _pages_are_small(report) else ''}{checked}")
