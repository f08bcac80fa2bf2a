"""Chat templates against `transformers` itself; needs the extra `oracle`.

Beside the templates of this repository it renders those in the folder that FERRUM_TEMPLATES names: one .jinja file each.
"""
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from chat_cases import CONVERSATIONS, SPECIAL_TOKENS, option_sets, own_templates  # noqa: E402

from ferrum.chat_template import ChatTemplate  # noqa: E402
from ferrum.errors import ChatTemplateError  # noqa: E402

pytestmark = pytest.mark.oracle


def given_templates():
    folder = os.environ.get("FERRUM_TEMPLATES", "")
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(Path(folder).glob("*.jinja"))} if folder else {}


def assert_equal_to_transformers(source):
    pytest.importorskip("transformers", reason="needs the extra oracle: transformers is not installed")
    from chat_oracle import transformers_text

    template = ChatTemplate(source, **SPECIAL_TOKENS)
    for name, messages in CONVERSATIONS.items():
        for options in option_sets():
            try:
                text = template.render(messages, **options)
            except ValueError:  # ChatTemplateError is one
                text = None
            assert text == transformers_text(source, messages, SPECIAL_TOKENS, **options), (name, options)


@pytest.mark.parametrize("name", own_templates())
def test_own_templates_render_as_transformers_renders_them(name):
    assert_equal_to_transformers(own_templates()[name])


@pytest.mark.parametrize("name", given_templates() or [None])
def test_given_templates_render_as_transformers_renders_them(name):
    if name is None:
        pytest.skip("FERRUM_TEMPLATES does not name a folder of .jinja files")
    assert_equal_to_transformers(given_templates()[name])
