"""A small byte-level BPE for the demo, with Qwen's pre-tokenizer and its 26 added tokens.

Source of the splitting pattern, the added tokens and chat_template.json: the tokenizer files of
Qwen3-VL (Apache-2.0).
"""

import json
from pathlib import Path

import numpy as np

from qwen3vl_jax.demo import questions, scenes, wordings

VOCABULARY_SIZE = 896
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ADDED = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEMPLATE = Path(__file__).with_name("chat_template.json")


def corpus() -> list[str]:
    """What the merges are learnt from: seen wordings, answers, the chat's own words."""
    rng = np.random.default_rng(20260101)
    limits = scenes.SceneRange(1, 6, 0.6)
    lines = [
        "user\n",
        "assistant\n",
        "system\n",
        *scenes.WORDS,
        *scenes.COLOURS,
        *scenes.CELLS,
        *scenes.SHAPES,
    ] * 40
    for _ in range(3000):
        pair = (scenes.sample_scene(rng, limits), scenes.sample_scene(rng, limits))
        # Questions about several things have no words of their own.
        for kind in (kind for kind in questions.KINDS if kind != "several"):
            asked = questions.ask(rng, pair if rng.random() < 0.5 else pair[:1], kind)
            if asked is not None:
                lines += [asked.text, asked.answer]
    return lines + [part for pair in wordings.PICTURES_OF_TWO for part in pair]


def write_tokenizer(directory: Path) -> None:
    """Learns the merges; writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        normalizers,
        pre_tokenizers,
        trainers,
    )
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL) - len(ADDED),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in ADDED])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = _settings(added_ids(directory))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=1) + "\n", encoding="utf-8"
    )
    template = json.loads(_TEMPLATE.read_text(encoding="utf-8"))["chat_template"]
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def added_ids(directory: Path) -> dict[str, int]:
    """Ids of the added tokens of the tokenizer in `directory`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab()
    return {token: vocabulary[token] for token in (*SPECIAL, *ADDED)}


def _settings(ids: dict[str, int]) -> dict[str, object]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "added_tokens_decoder": {
            str(number): {"content": token, **plain, "special": token in SPECIAL}
            for token, number in ids.items()
        },
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
