"""What a model would take, and how many tokens of KV cache a budget leaves, before anything is loaded.

    python tools/examples/fit_memory.py [MODEL.gguf [BUDGET]]
"""

import sys

import ferrum

MIB = 1 << 20


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else None
    budget = sys.argv[2] if len(sys.argv) > 2 else "27MiB"
    for title, options in (("as it is", {}), (f"within {budget}", {"memory_budget": budget})):
        try:
            plan = ferrum.plan(model, **options)
        except ferrum.OutOfMemory as error:
            print(f"{title}: {error}")
            continue
        print(f"{title}: weights {plan.weights_bytes / MIB:.1f} MiB, KV cache {plan.kv_bytes / MIB:.1f} MiB for "
              f"{plan.options['kv_tokens']} tokens, scratch {plan.scratch_bytes / MIB:.1f} MiB")


if __name__ == "__main__":
    main()
