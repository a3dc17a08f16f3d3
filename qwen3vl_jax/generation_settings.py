"""When an answer ends and how its tokens are chosen: a checkpoint's defaults, then the caller's.

Names, defaults and meaning are those of transformers 5.23, `GenerationConfig`. A setting that would
change the answer and that we do not compute is an error that names it. Nothing here needs JAX, so
that a mistake in a command line is found at once.
"""

import dataclasses
import difflib
import json
import logging
import math
import numbers
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen3vl_jax.errors import ConfigError, Qwen3VLError, UsageError

MAX_FILE_BYTES = 1 << 20
MAX_NEW_TOKENS = 1 << 20
MAX_STOP_STRINGS = 64
MAX_TOKEN_ID = (1 << 31) - 1
DRAFTS = ("prompt-lookup",)

# Least and greatest value of each setting.
_WHOLE = {
    "max_new_tokens": (1, MAX_NEW_TOKENS),
    "top_k": (0, MAX_TOKEN_ID),
    "seed": (0, (1 << 32) - 1),
    "pad_token_id": (0, MAX_TOKEN_ID),
}
_REAL = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.001, 1000.0),
    "presence_penalty": (-2.0, 2.0),
}

# Settings that we do not compute, with the values under which they change nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "bad_words_ids": (None,),
    "begin_suppress_tokens": (None,),
    "constraints": (None,),
    "diversity_penalty": (None, 0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "frequency_penalty": (None, 0),
    "guidance_scale": (None, 1),
    "max_length": (None, 20),
    "max_time": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_logits": (None, False),
    "output_scores": (None, False),
    "penalty_alpha": (None, 0),
    "remove_invalid_values": (None, False),
    "return_dict_in_generate": (None, False),
    "sequence_bias": (None,),
    "suppress_tokens": (None,),
    "token_healing": (None, False),
    "top_h": (None,),
    "typical_p": (None, 1),
    "use_mtp": (None, False),
    "watermarking_config": (None,),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen. The defaults change nothing but draw; a temperature of 0 is greedy."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0

    @property
    def needs_history(self) -> bool:
        """Whether tokens seen before count."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How one answer is generated. Values are checked when an instance is made.

    A temperature of 0 is greedy; `do_sample` false is greedy whatever the other settings say.
    `top_k` 0 keeps every token. Without a `seed`, one is drawn from the system for each call.
    `stop_strings` end an answer like transformers' do: the token that completes one is kept.
    `draft` "prompt-lookup" guesses tokens and verifies several in one pass (`drafting`).

    Raises:
        UsageError: a value has the wrong type or is out of range.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    seed: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    stop_strings: tuple[str, ...] = ()
    draft: str | None = None

    def __post_init__(self) -> None:
        for name in _FIELDS:
            _checked(name, getattr(self, name))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return not self.do_sample or self.temperature == 0.0

    @property
    def sampling(self) -> Sampling:
        """The part that the choice of a token depends on."""
        penalties = (self.repetition_penalty, self.presence_penalty)
        if self.greedy:
            return Sampling(0.0, 0, 1.0, 0.0, *penalties)
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, *penalties)

    @property
    def padding(self) -> int:
        """What finished rows are filled with: the pad token, else the first end token, else 0."""
        return self.pad_token_id if self.pad_token_id is not None else (*self.eos_token_id, 0)[0]

    def override(self, **given: object) -> "GenerationSettings":
        """These settings with some replaced, by their names in transformers; None is not given.

        A temperature above 0 without `do_sample` turns sampling on, 0 turns it off.

        Raises:
            UsageError: a name that does not exist, a value out of range, or a setting that would
                change the answer and that we do not compute.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        for name in chosen:
            if name not in _FIELDS and name not in _UNSUPPORTED:
                near = difflib.get_close_matches(name, sorted(_FIELDS), n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(_FIELDS)}"
                raise UsageError(f"generation setting '{name}' does not exist; {hint}")
        if "temperature" in chosen and "do_sample" not in chosen:
            chosen["do_sample"] = chosen["temperature"] != 0
        return self._with(chosen)

    def _with(self, chosen: Mapping[str, Any]) -> "GenerationSettings":
        for name, neutral in _UNSUPPORTED.items():
            if name in chosen and chosen[name] not in neutral:
                raise UsageError(
                    f"generation setting '{name}' = {chosen[name]!r} is not computed here; "
                    f"set it to {neutral[-1]!r} or leave it out"
                )
        known = {name: _checked(name, chosen[name]) for name in _FIELDS if name in chosen}
        return dataclasses.replace(self, **known)


_FIELDS = tuple(field.name for field in dataclasses.fields(GenerationSettings))


def load_settings(directory: str | Path) -> GenerationSettings:
    """A checkpoint's own settings: its generation_config.json, else the end tokens of config.json.

    Raises:
        ConfigError: the file is not JSON, a value is out of range, or a setting is not computed.
    """
    path = Path(directory) / "generation_config.json"
    if path.is_file():
        found = _read_object(path)
    else:
        path = Path(directory) / "config.json"
        whole = _read_object(path)
        text = whole.get("text_config")
        merged = whole | (text if isinstance(text, dict) else {})
        names = ("eos_token_id", "pad_token_id")
        found = {name: merged[name] for name in names if name in merged}
    given = {name: value for name, value in found.items() if value is not None}
    unknown = sorted(given.keys() - set(_FIELDS) - _UNSUPPORTED.keys())
    if unknown:
        logging.getLogger(__name__).info("%s: not used: %s", path, ", ".join(unknown))
    try:
        return GenerationSettings()._with(given)
    except Qwen3VLError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES:,} B, not a settings file")
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name the directory of a checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must hold one JSON object, not {type(found).__name__}")
    return found


def _checked(name: str, value: Any) -> Any:
    """The value as its field's type: Python's own numbers, and tuples of them.

    Raises:
        UsageError: wrong type or out of range.
    """
    match name:
        case "do_sample":
            if not isinstance(value, bool):
                raise UsageError(f"do_sample must be true or false, not {value!r}")
            return value
        case "eos_token_id":
            return tuple(_integer(name, token, 0, MAX_TOKEN_ID) for token in _listed(value))
        case "stop_strings":
            return _stop_strings(_listed(value))
        case "seed" | "pad_token_id" | "draft" if value is None:
            return None
        case "draft":
            if value not in DRAFTS:
                raise UsageError(f"draft {value!r} is not one of {', '.join(DRAFTS)}")
            return value
    if name in _WHOLE:
        return _integer(name, value, *_WHOLE[name])
    return _number(name, value, *_REAL[name])


def _listed(value: Any) -> tuple[Any, ...]:
    several = isinstance(value, Iterable) and not isinstance(value, str)
    return tuple(value) if several else (value,)


def _integer(name: str, value: Any, lowest: int, highest: int) -> int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not lowest <= value <= highest:
        raise UsageError(
            f"{name} must be a whole number from {lowest:,} to {highest:,}, not {value!r}"
        )
    return int(value)


def _number(name: str, value: Any, lowest: float, highest: float) -> float:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not lowest <= value <= highest:
        raise UsageError(f"{name} must be a number from {lowest:g} to {highest:g}, not {value!r}")
    return float(value)


def _stop_strings(values: tuple[Any, ...]) -> tuple[str, ...]:
    if len(values) > MAX_STOP_STRINGS:
        raise UsageError(f"stop_strings: {len(values)} strings, at most {MAX_STOP_STRINGS}")
    for value in values:
        if not isinstance(value, str) or not value:
            raise UsageError(f"stop_strings must be strings that are not empty, not {value!r}")
    return values
