"""Make a tiny random chat model, so that a real engine can be tested in seconds, without a download.

It answers nonsense; its tokenizer, chat template, counts and limits are real. It runs in the engine's own environment,
which has the three libraries that it needs: torch, tokenizers and transformers. ``docs/engines.md`` has the commands.

    python tests/engines/tiny_model.py FOLDER [--window TOKENS]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 7
VOCABULARY = 512
SHARPNESS = 14  # as initialised, every token would be as likely as any other, the end included
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}{% for message in messages %}"
    "{{ message['role'] + '\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
)
TEXT = (
    "system\nuser\nassistant\n",
    "the cat sat on the mat and the dog lay by the door while rain fell on the old stone house",
    "a stream of tokens is a stream of small pieces of text, one after the other, until the end",
    "Explain server-sent events in one line. Say hello in three words. Write a function that adds 2 and 3.",
    "Grüße aus Köln, à bientôt, 你好世界, привет, 🙂🚀",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a tiny random chat model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--window", type=int, default=4096, help="context window in tokens")
    options = parser.parse_args()
    tokenizer = trained_tokenizer(options.window)
    random_model(tokenizer, options.window).save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    print(f"{options.folder}: {len(tokenizer)} tokens, a window of {options.window}")


def trained_tokenizer(window: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few lines, so that any text at all can be encoded."""
    bare = Tokenizer(BPE())
    bare.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bare.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bare,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=window,
    )


def random_model(tokenizer: PreTrainedTokenizerFast, window: int) -> LlamaForCausalLM:
    """Two layers of random weights, the same in every run. It goes on until a limit or a stop text ends it."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=window,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(SHARPNESS)
        model.lm_head.weight[tokenizer.eos_token_id] = 0  # far below what the others reach
    return model


if __name__ == "__main__":
    main()
