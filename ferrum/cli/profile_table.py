"""The engine's profile as tables that fit 80 columns."""

from __future__ import annotations

from typing import Any

from ferrum.cli.output import size

# Ops between two steps, which are not part of the seconds of steps: see `Engine.profile`.
_BETWEEN_STEPS = ("top_candidates", "copy_kv_blocks")
_TITLES = f"{'op':<19}{'calls':>6}{'ms':>9}{'share':>7}{'bytes':>11}{'GB/s':>7}{'of bw':>7}{'GMAC/s':>7}{'of max':>7}"


def profile_lines(profile: dict[str, Any], bandwidth: float | None, products: float | None) -> list[str]:
    """Tables of what `Engine.profile` counted, a phase each, most time first.

    `bandwidth`: what memory gives, in bytes a second; `products`: multiply-accumulates a second of weights in the cache. Shares are of all seconds
    of a phase. "of bw" and "of max" are an op's rates as shares of these: near 100% of one it cannot become faster but by reading or computing less.
    """
    lines: list[str] = []
    for name, phase in profile["phases"].items():
        lines += [""] * bool(lines) + _phase_lines(name, phase, bandwidth, products)
    return lines or ["no step was profiled"]


def _phase_lines(name: str, phase: dict[str, Any], bandwidth: float | None, products: float | None) -> list[str]:
    ops = sorted(phase["ops"].items(), key=lambda item: -item[1]["seconds"])
    between = sum(op["seconds"] for name, op in ops if name in _BETWEEN_STEPS)
    whole = phase["seconds"] + between
    outside = whole - sum(op["seconds"] for _, op in ops)
    steps, tokens = phase["steps"], phase["tokens"]
    speed = f", {tokens / whole:.{0 if tokens >= 100 * whole else 1}f} tokens/s" if whole else ""
    return [
        f"{name}: {_counted(steps, 'step')}, {_counted(tokens, 'token')}, {whole:.4g} s{speed}",
        _TITLES,
        *(_row(name, op, whole, bandwidth, products) for name, op in ops),
        f"{'outside the ops':<19}{'':>6}{outside * 1e3:>9.1f}{_share(outside, whole):>7}",
    ]


def _row(name: str, op: dict[str, Any], whole: float, bandwidth: float | None, products: float | None) -> str:
    seconds, nbytes, macs = op["seconds"], op["bytes"], op["macs"]
    rate = nbytes / seconds if seconds else 0.0
    cells = [
        f"{op['calls']:>6}", f"{seconds * 1e3:>9.1f}", f"{_share(seconds, whole):>7}",
        f"{size(nbytes) if nbytes else '':>11}",
        f"{_billions(rate):>7}",
        f"{_share(rate, bandwidth) if nbytes and bandwidth else '':>7}",
        f"{_billions(macs / seconds if seconds else 0.0):>7}",
        f"{_share(macs / seconds, products) if macs and seconds and products else '':>7}",
    ]
    return f"{name:<19}{''.join(cells)}".rstrip()


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _billions(rate: float) -> str:
    return f"{rate / 1e9:.1f}" if rate else ""


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
