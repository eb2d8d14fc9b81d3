"""A tokenizer that needs no download: one token a byte, in the form that transformers saves and loads."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<bos>", "<eos>")
"""Token ids 0, 1, 2; a byte b is token 3 + b."""
_CHAT = (
    "{% for message in messages %}<bos>{{ message.role }}\n{{ message.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


def byte_tokenizer(*, add_bos: bool = False, chat: bool = True) -> PreTrainedTokenizerFast:
    """259 tokens: three special ones and the 256 bytes of UTF-8 text.

    Args:
        add_bos: Put ``<bos>`` before every text, as Llama and Gemma do.
        chat: Give it a chat template.
    """
    vocabulary = {token: number for number, token in enumerate((*SPECIALS, *_byte_letters()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    pad, bos, eos = SPECIALS
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos
    )
    if chat:
        tokenizer.chat_template = _CHAT
    return tokenizer


def _byte_letters() -> list[str]:
    """ByteLevel's letter for each byte: itself if printable, else one from U+0100 on (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
