"""Makes chat_templates.json: what `transformers` renders for chat_cases.golden_cases. Needs the extra `oracle`.

    python tests/golden/make_chat_templates.py

A row is the names of template and conversation and the text, null where transformers or the template refuses. The
options of a row are those of its place in golden_cases.
"""
import json
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "oracle")]

from chat_cases import CONVERSATIONS, GOLDEN, SPECIAL_TOKENS, golden_cases, own_templates  # noqa: E402
from chat_oracle import transformers_text  # noqa: E402


def main():
    templates = own_templates()
    rows = [[template, name, transformers_text(templates[template], CONVERSATIONS[name], SPECIAL_TOKENS, **options)]
            for template, name, options in golden_cases()]
    lines = ",\n".join(json.dumps(row, ensure_ascii=True) for row in rows)
    GOLDEN.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    refused = sum(text is None for _, _, text in rows)
    print(f"{GOLDEN.name}: {len(rows)} rows, {refused} refused, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
