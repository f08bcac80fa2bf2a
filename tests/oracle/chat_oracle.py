"""Chat templates rendered by `transformers`. Needs the extra `oracle`."""


def transformers_render(source, messages, special_tokens, **options):
    """What `apply_chat_template` of a tokenizer with these special tokens makes of the messages."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **special_tokens)
    return tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **options)


def transformers_text(source, messages, special_tokens, **options):
    """The rendered text; None where transformers or the template refuses, which it does with errors of many kinds."""
    try:
        return transformers_render(source, messages, special_tokens, **options)
    except Exception:
        return None
