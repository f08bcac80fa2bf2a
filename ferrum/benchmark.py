"""How fast a model runs here: its start, prompts and decode at several batch sizes, beside what memory allows.

Nothing but the order of measurements, what they need and what they mean; the timed runs are in `timed_runs`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from statistics import median
from subprocess import DEVNULL, PIPE, Popen
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ferrum.errors import FerrumError, OptionError
from ferrum.options import DEFAULT, Resolved, check_settings, described, resolve, setting
from ferrum.step_bytes import decode_step_bytes, distinct_experts

if TYPE_CHECKING:
    from ferrum.llm import LLM

Progress = Callable[[str], None]

_MOST_TOKENS = 1 << 30
_KV_BLOCK = 16  # tokens

# A child's whole life up to its first token; `argv`: model, options and token ids as JSON.
_FIRST_TOKEN = """
import json, sys
from ferrum import LLM, SamplingParams
model, options, ids = json.loads(sys.argv[1])
with LLM(model, **options) as llm, llm.stream(ids, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)) as stream:
    next(stream)
    print(end=".", flush=True)
"""


@described
@dataclass(frozen=True, kw_only=True)
class BenchParams:
    """What is measured. Raises OptionError that names the field, its value and what is allowed."""

    prompt_tokens: int = setting(512, int, "tokens of each prompt", unit="tokens", minimum=1, maximum=_MOST_TOKENS)
    gen_tokens: int = setting(
        128, int, "decode steps that are timed, each a token of every sequence", unit="tokens", minimum=1, maximum=_MOST_TOKENS
    )
    batch: tuple[int, ...] = setting(
        (1, 4, 8, 16), int, "how many sequences run together, one measurement each", unit="sequences", minimum=1, maximum=65536,
        sequence=True, may_be_empty=False, commas=True, default_text="1,4,8,16", metavar="N,N,...",
    )
    context: int | None = setting(
        None, int, "tokens of each sequence that are in the KV cache where decode begins", unit="tokens", minimum=1,
        maximum=_MOST_TOKENS, default_text="those of the prompt",
    )
    repeat: int = setting(3, int, "rounds over all batch sizes; medians are reported", unit="rounds", minimum=1, maximum=1000)

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "batch", tuple(dict.fromkeys(self.batch)))  # each once

    @property
    def depth(self) -> int:
        """Tokens in the KV cache where decode begins."""
        return self.prompt_tokens if self.context is None else self.context

    @property
    def sequences(self) -> int:
        return max(self.batch)

    @property
    def sequence_tokens(self) -> int:
        """Tokens that a sequence reaches."""
        return max(self.prompt_tokens, self.depth + self.gen_tokens)

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache that the runs need: whole blocks, and one to grow for each sequence, so that none is ever put back."""
        return self.sequences * (-(-self.sequence_tokens // _KV_BLOCK) + 1) * _KV_BLOCK


@dataclass(frozen=True)
class BatchReport:
    """Figures of one batch size: medians, and each [least, most] of the rounds.

    `bound_tok_s`: decode at the measured memory bandwidth, if a step read nothing but `step_bytes`, as
    `decode_step_bytes` expects them; `decode_gb_s`: those bytes at the rate of decode. `ids_ok`: see `BenchReport`.
    """

    batch: int
    prompt_tokens: int
    gen_tokens: int
    context: int
    prefill_tok_s: float
    decode_tok_s: float
    prefill_tok_s_range: tuple[float, float]
    decode_tok_s_range: tuple[float, float]
    distinct_experts: float
    step_bytes: float
    decode_gb_s: float
    bound_tok_s: float
    ids_ok: bool | None
    mismatch: str | None


@dataclass(frozen=True)
class BenchReport:
    """All figures of a benchmark. None where the system does not say, or nothing was asked.

    `first_token_s`: from the start of a process to the first token of an 8-token prompt, its file in the page cache.
    `product_rate_gmac_s`: as of `Engine.measure_product_rate`, in billions.
    `rss_file_huge_bytes`: what of `rss_file_bytes` is mapped in huge pages, from which weights are read faster.
    `ids_ok`: every sequence of a batch generated the ids that it gives alone (devices other than the CPU do not promise
    that). `profile`: as of `Engine.profile`, of an engine of its own: the prompts and batched decode of the largest batch
    size, and single decode where 1 is one of them.
    """

    model: str
    device: str
    threads: int
    load_s: float
    first_token_s: float
    peak_rss_bytes: int
    rss_file_bytes: int | None
    rss_file_huge_bytes: int | None
    rss_anon_bytes: int | None
    memory_bandwidth_gb_s: float
    product_rate_gmac_s: float | None
    runs: list[BatchReport]
    ids_ok: bool | None
    profile: dict[str, Any] | None


@dataclass
class _Rounds:
    """Figures of one batch size as they come."""

    prefill_tok_s: list[float] = field(default_factory=list)
    decode_tok_s: list[float] = field(default_factory=list)
    mismatch: str | None = None

    def compare(self, ids: list[list[int]], expected: list[list[int]]) -> None:
        """Note the first sequence that is not the beginning of what is expected of it."""
        for index, (given, wanted) in enumerate(zip(ids, expected)):
            if given != wanted and self.mismatch is None:
                at = next((at for at, pair in enumerate(zip(given, wanted)) if pair[0] != pair[1]), min(len(given), len(wanted)))
                self.mismatch = f"sequence {index + 1} differs from its run alone from generated token {at + 1} on"


def benchmark(
    model: str | os.PathLike | None = None, params: BenchParams | None = None, *, progress: Progress | None = None, **options: Any,
) -> BenchReport:
    """Measure a model; `options` are those of LLM. `kv_tokens` and `max_sequences` are what the runs need, unless they are given.

    With the option `profile` the runs are repeated in a second engine that counts. Raises what LLM raises, and before anything runs
    OptionError where the options or the model's context cannot hold the runs.
    """
    from ferrum.llm import LLM
    from ferrum.timed_runs import random_prompts, warm_up

    params = BenchParams() if params is None else params
    tell = progress or (lambda text: None)
    resolved = _with_room(resolve(model, options), params)
    with LLM(resolved.model, **_arguments(resolved, profile=False), progress=lambda done, total: tell(f"loading {done / total:.0%}")) as llm:
        prompts = random_prompts(llm.tokenizer, params.sequences, max(params.prompt_tokens, params.depth))
        (first_prompt,) = random_prompts(llm.tokenizer, 1, 8)
        tell("warming up")
        warm_up(llm, prompts)
        expected = _single_runs(llm, params, prompts, tell) if llm.engine.device.startswith("cpu") else None
        rounds, memory, bandwidth = _measure(llm, params, prompts, expected, tell)
        products = llm.engine.measure_product_rate()
        runs = [_batch_report(llm, params, batch, rounds[batch], median(bandwidth), expected is not None) for batch in params.batch]
        device, threads, load_s = llm.engine.device, llm.options["threads"], llm.load_s
    tell("measuring the time to the first token")
    first_token_s = _first_token_s(resolved, first_prompt, params.repeat)
    return BenchReport(
        model=resolved.model, device=device, threads=threads, load_s=load_s, first_token_s=first_token_s, **memory,
        memory_bandwidth_gb_s=median(bandwidth) / 1e9, product_rate_gmac_s=products and products / 1e9, runs=runs, ids_ok=None if expected is None else all(run.ids_ok for run in runs),
        profile=_profile(resolved, params, prompts, tell) if resolved.options.profile else None,
    )


def _with_room(resolved: Resolved, params: BenchParams) -> Resolved:
    """The options with room for the runs; OptionError where what was given has not."""
    from ferrum.gguf_file import GGUFFile
    from ferrum_native._native import plan

    context = plan(GGUFFile.open(resolved.model), kv_tokens=1)["config"]["context_length"]
    if params.sequence_tokens > context:
        parts = "--prompt-tokens" if params.context is None else "--prompt-tokens, --context"
        raise OptionError(f"A sequence reaches {params.sequence_tokens} tokens, the model's context holds {context}. Lower {parts} or --gen-tokens.")
    options = resolved.options
    for name, needed in (("max_sequences", params.sequences), ("max_logit_rows", params.sequences), ("kv_tokens", params.kv_tokens)):
        given = getattr(options, name)
        if resolved.sources[name] != DEFAULT and given is not None and given < needed:
            raise OptionError(f"{name} is {given}, but the runs need {needed}: {params.sequences} sequences of {params.sequence_tokens} tokens, "
                              f"in whole blocks. Raise {name}, leave it out, or lower --batch.")
    room = {"max_sequences": params.sequences, "kv_tokens": params.kv_tokens}
    return resolved._replace(options=replace(options, **{name: n for name, n in room.items() if resolved.sources[name] == DEFAULT}))


def _arguments(resolved: Resolved, *, profile: bool) -> dict[str, Any]:
    return replace(resolved.options, profile=profile, prefix_cache=False).arguments()  # every round computes its prompts


def _single_runs(llm: LLM, params: BenchParams, prompts: list[list[int]], tell: Progress) -> list[list[int]]:
    """The ids that each sequence shall generate."""
    from ferrum.timed_runs import alone

    expected = []
    for index, prompt in enumerate(prompts):
        tell(f"sequence {index + 1} of {len(prompts)} alone")
        expected.append(alone(llm, prompt[: params.depth], params.gen_tokens + 1))
    return expected


def _measure(
    llm: LLM, params: BenchParams, prompts: list[list[int]], expected: list[list[int]] | None, tell: Progress,
) -> tuple[dict[int, _Rounds], dict[str, int | None], list[float]]:
    """The rounds of each batch size; the memory of this process after the first; the memory bandwidth after each, in bytes a second.

    Batch sizes take turns in a round, so that a machine that slows down does so for all. Memory is read before the bandwidth is
    first measured, which takes a large buffer.
    """
    from ferrum.timed_runs import decode, keeping, read_prompts

    rounds = {batch: _Rounds() for batch in params.batch}
    bandwidth: list[float] = []
    memory: dict[str, int | None] = {}
    starts = [prompt[: params.prompt_tokens] for prompt in prompts]
    for number, batch in _turns(params):
        tell(f"round {number} of {params.repeat}: prompts of batch {batch}")
        timed = read_prompts(llm, starts[:batch])
        rounds[batch].prefill_tok_s.append(batch * params.prompt_tokens / timed.seconds)
        if expected is not None and params.depth == params.prompt_tokens:
            rounds[batch].compare(timed.ids, [ids[:1] for ids in expected])
    deep = [prompt[: params.depth] for prompt in prompts]
    with keeping(llm, len(deep)) as retained:
        tell(f"filling the context of {len(deep)} sequences")
        read_prompts(llm, deep, retained)
        for number, batch in _turns(params):
            tell(f"round {number} of {params.repeat}: decode of batch {batch}")
            timed = decode(llm, deep[:batch], retained[:batch], params.gen_tokens)
            rounds[batch].decode_tok_s.append(batch * params.gen_tokens / timed.seconds)
            if expected is not None:
                rounds[batch].compare(timed.ids, expected)
            if batch == params.batch[-1]:
                memory = memory or _memory()
                bandwidth.append(llm.engine.measure_bandwidth())
    return rounds, memory, bandwidth


def _turns(params: BenchParams) -> Iterator[tuple[int, int]]:
    return ((number, batch) for number in range(1, params.repeat + 1) for batch in params.batch)


def _batch_report(llm: LLM, params: BenchParams, batch: int, rounds: _Rounds, bandwidth: float, checked: bool) -> BatchReport:
    config = llm.engine.config
    seen = params.depth + (params.gen_tokens + 1) / 2  # by attention, on average over the steps
    nbytes = decode_step_bytes(llm.file, config, llm.engine.kv_bytes_per_token, batch, seen)
    decode_tok_s = median(rounds.decode_tok_s)
    return BatchReport(
        batch=batch, prompt_tokens=params.prompt_tokens, gen_tokens=params.gen_tokens, context=params.depth,
        prefill_tok_s=median(rounds.prefill_tok_s), decode_tok_s=decode_tok_s,
        prefill_tok_s_range=(min(rounds.prefill_tok_s), max(rounds.prefill_tok_s)),
        decode_tok_s_range=(min(rounds.decode_tok_s), max(rounds.decode_tok_s)),
        distinct_experts=distinct_experts(config, batch), step_bytes=nbytes, decode_gb_s=decode_tok_s / batch * nbytes / 1e9,
        bound_tok_s=batch * bandwidth / nbytes, ids_ok=rounds.mismatch is None if checked else None, mismatch=rounds.mismatch,
    )


def _memory() -> dict[str, int | None]:
    """Resident memory of this process: its peak so far, and now that of files, of these what lies in huge pages, and its own, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    now = _proc_bytes("status") | _proc_bytes("smaps_rollup")
    return {"peak_rss_bytes": peak, "rss_file_bytes": now.get("RssFile"), "rss_file_huge_bytes": now.get("FilePmdMapped"), "rss_anon_bytes": now.get("RssAnon")}


def _proc_bytes(name: str) -> dict[str, int]:
    """The lines `key: N kB` of a file of /proc/self; none where the system has no such file."""
    try:
        with open(f"/proc/self/{name}", encoding="ascii", errors="replace") as lines:
            return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith(" kB\n")}
    except OSError:
        return {}


def _first_token_s(resolved: Resolved, prompt: list[int], runs: int) -> float:
    """Median seconds from the start of a Python process to its first token, after a run that warms the page cache."""
    argument = json.dumps([resolved.model, _arguments(resolved, profile=False), prompt])
    seconds = []
    for _ in range(runs + 1):
        started = perf_counter()
        with Popen([sys.executable, "-c", _FIRST_TOKEN, argument], stdin=DEVNULL, stdout=PIPE, stderr=PIPE) as child:
            try:
                assert child.stdout is not None
                came = child.stdout.read(1)
                seconds.append(perf_counter() - started)
                _, complaint = child.communicate()
            except BaseException:
                child.kill()
                raise
        if not came or child.returncode:
            last = complaint.decode(errors="replace").strip().splitlines()[-1:]
            raise FerrumError(f"The process that times the first token ended with code {child.returncode}: {''.join(last)}")
    return median(seconds[1:])


def _profile(resolved: Resolved, params: BenchParams, prompts: list[list[int]], tell: Progress) -> dict[str, Any]:
    """What the ops take, counted in an engine of its own: waiting for each op would slow the timed runs."""
    from ferrum.llm import LLM
    from ferrum.timed_runs import decode, keeping, read_prompts, warm_up

    phases: dict[str, Any] = {}
    with LLM(resolved.model, **_arguments(resolved, profile=True)) as llm:
        warm_up(llm, prompts)
        for batch in sorted({1, params.sequences} & set(params.batch)):
            tell(f"profiling batch {batch}")
            llm.engine.reset_profile()
            read_prompts(llm, [prompt[: params.prompt_tokens] for prompt in prompts[:batch]])
            phases |= _phases(llm, "prefill")
            deep = [prompt[: params.depth] for prompt in prompts[:batch]]
            with keeping(llm, batch) as retained:
                read_prompts(llm, deep, retained)
                llm.engine.reset_profile()
                decode(llm, deep, retained, params.gen_tokens)
            phases |= _phases(llm, "decode" if batch == 1 else "batched decode")
    return {"phases": phases}


def _phases(llm: LLM, name: str) -> dict[str, Any]:
    """A phase of the profile, if it ran; a prompt's last token by itself counts as decode and is not wanted."""
    profile = llm.profile()
    return {name: profile["phases"][name]} if profile and name in profile["phases"] else {}
