"""Models that never existed, in shapes to measure a machine with: no weight of theirs is real.

What is fitted and what is predicted differ in the shapes of the model, not only in the request.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memsched.calibration.trials import Trial, make_trial
from memsched.machine import Machine
from qwen3vl_jax.cache_rows import row_dtype
from qwen3vl_jax.checkpoints.encodings import as_encoded, encodings_of, everywhere
from qwen3vl_jax.config import Config, TextConfig, VisionConfig, load_config
from qwen3vl_jax.layer_steps import WHOLE_LAYERS
from qwen3vl_jax.long_cache import block_shape
from qwen3vl_jax.long_phases import long_phases
from qwen3vl_jax.phases import phases
from qwen3vl_jax.planned.granularity import finest, vocab_rows
from qwen3vl_jax.planned.programs import Traced, trace_phase
from qwen3vl_jax.planned.request import Request
from qwen3vl_jax.planned.skeleton import shape_network
from qwen3vl_jax.planned.works import Work, works_of

MODELS = Path(__file__).resolve().parents[2] / "configs/models"
DENSE, SPARSE = "qwen3-vl-2b-instruct.json", "qwen3-vl-30b-a3b-instruct.json"
HEAD_DIM = 128


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A decoder: hidden and inner width, query and key heads, layers, vocabulary; a tower's width.

    Enough layers that no cache of the processor holds them. With `experts` each layer has so many
    of that inner width, of which a token takes as many as in the released models.
    """

    hidden: int
    inner: int
    heads: int
    key_heads: int
    layers: int
    vocab: int = 16384
    tower: int = 768
    depth: int = 4
    experts: int = 0

    @property
    def name(self) -> str:
        """What is measured together."""
        width = f"{self.hidden}x{self.inner}"
        return f"{width}x{self.experts}" if self.experts else width


@dataclasses.dataclass(frozen=True, slots=True)
class Rehearsal:
    """One phase of a model: `tokens` of a prompt, or one of an answer after `context` in the cache.

    A square picture of `side` pixels goes through the tower, or comes before a prompt.

    `share` is how much of the weights stays in memory, which are encoded with `codec`. Layers are
    `split` into the finest steps, as on machines that stream, or whole. The cache is stored as
    `kv` says; `in_blocks` those that are full are read as weights are.
    """

    shape: Shape
    phase: str
    context: int = 512
    tokens: int = 1
    batch: int = 1
    dtype: str = "bfloat16"
    share: float = 1.0
    side: int = 0
    codec: str = "raw"
    split: bool = False
    kv: str = "raw"
    in_blocks: bool = False

    @property
    def name(self) -> str:
        """Short, for tables."""
        what = f"{self.tokens} tokens" if self.phase == "prefill" else f"after {self.context}"
        if self.side:
            what = f"{self.side}x{self.side}" + (f" {what}" if self.phase == "prefill" else "")
        form = self.dtype if self.codec == "raw" else self.codec
        cut = "split " if self.split else ""
        cache = "" if self.kv == "raw" else f" in {self.kv}"
        cache += " in blocks" if self.in_blocks else ""
        where = f"x{self.batch} at {self.share:.0%}"
        return f"{self.phase} {self.shape.name} {cut}{form} {what}{cache} {where}"


_SMALL = Shape(768, 2304, 6, 2, 12, tower=640)
_NARROW = Shape(1024, 3072, 16, 8, 8, tower=1024)
_MIDDLE = Shape(1536, 4096, 12, 4, 6, 32768, tower=896)
_WIDE = Shape(2560, 9728, 32, 8, 2, 32768)
_BROAD = Shape(3072, 8192, 24, 8, 2, 24576)
_TESTED = Shape(2048, 6144, 16, 8, 5, 32768, tower=768, depth=5)
_OTHER = Shape(1280, 3584, 10, 2, 8, 24576, tower=1152)
_SPARSE = Shape(1024, 512, 16, 8, 4, experts=32)
_SPARSER = Shape(1536, 384, 12, 4, 3, 32768, experts=48)
_TESTED_SPARSE = Shape(1280, 448, 10, 2, 4, 24576, experts=40)

# Of each kind something that is read while it computes has a twin that is all in memory: only so
# can one see how much longer steps take for that. In two minutes there is time for about thirty.
CALIBRATION: tuple[Rehearsal, ...] = (
    Rehearsal(_NARROW, "decode", 512),
    Rehearsal(_NARROW, "prefill", tokens=128),
    Rehearsal(_WIDE, "decode", 1024, share=0.3, split=True),
    Rehearsal(_WIDE, "decode", 1024, split=True),
    Rehearsal(_MIDDLE, "decode", 2048),
    Rehearsal(_SMALL, "prefill", tokens=512),
    Rehearsal(_NARROW, "vision", side=256),
    Rehearsal(_NARROW, "decode", 512, codec="int8"),
    Rehearsal(_WIDE, "decode", 256, codec="int4:32"),
    Rehearsal(_BROAD, "decode", 1024),
    Rehearsal(_SPARSE, "decode", 512, split=True),
    Rehearsal(_NARROW, "prefill", tokens=40, side=224),
    Rehearsal(_NARROW, "decode", 512, share=0.5, split=True),
    Rehearsal(_NARROW, "decode", 512, split=True),
    Rehearsal(_MIDDLE, "prefill", tokens=256),
    Rehearsal(_SMALL, "decode", 512, batch=4),
    Rehearsal(_MIDDLE, "prefill", tokens=64, share=0.4, split=True),
    Rehearsal(_NARROW, "prefill", tokens=128, share=0.6, split=True),
    Rehearsal(_NARROW, "prefill", tokens=128, split=True),
    Rehearsal(_SMALL, "vision", side=384),
    Rehearsal(_MIDDLE, "decode", 4096, in_blocks=True, share=0.6, split=True),
    Rehearsal(_MIDDLE, "decode", 4096, in_blocks=True, split=True),
    Rehearsal(_BROAD, "decode", 1024, share=0.4, split=True),
    Rehearsal(_BROAD, "decode", 1024, split=True),
    Rehearsal(_NARROW, "decode", 512, dtype="float32"),
    Rehearsal(_MIDDLE, "decode", 512, codec="int4:64"),
    Rehearsal(_SMALL, "prefill", tokens=128, codec="int8"),
    Rehearsal(_SMALL, "prefill", tokens=320, share=0.5, split=True),
    Rehearsal(_SMALL, "prefill", tokens=320, split=True),
    Rehearsal(_MIDDLE, "decode", 512, batch=6),
    Rehearsal(_SPARSE, "decode", 512, share=0.5, split=True),
    Rehearsal(_SPARSER, "decode", 1024, split=True),
    Rehearsal(_NARROW, "decode", 2048, kv="int8"),
    Rehearsal(_NARROW, "decode", 512, codec="int4:32", share=0.5, split=True),
    Rehearsal(_NARROW, "decode", 512, codec="int4:32", split=True),
    Rehearsal(_SMALL, "decode", 4096),
    Rehearsal(_SMALL, "decode", 1024, dtype="float32"),
    Rehearsal(_WIDE, "prefill", tokens=128),
    Rehearsal(_SMALL, "prefill", tokens=16),
    Rehearsal(_WIDE, "decode", 1024),
    Rehearsal(_SMALL, "prefill", tokens=128, dtype="float32"),
    Rehearsal(_MIDDLE, "decode", 512, batch=6, share=0.5, split=True),
    Rehearsal(_MIDDLE, "decode", 512, batch=6, split=True),
    Rehearsal(_MIDDLE, "decode", 512, batch=12),
    Rehearsal(_MIDDLE, "vision", side=320),
    Rehearsal(_SPARSE, "prefill", tokens=64, split=True),
    Rehearsal(_SMALL, "decode", 512, dtype="float16"),
    Rehearsal(_SMALL, "decode", 4096, kv="int8", in_blocks=True),
    Rehearsal(_NARROW, "prefill", tokens=32),
    Rehearsal(_BROAD, "decode", 256, batch=2),
    Rehearsal(_WIDE, "decode", 512, batch=4, codec="int8", share=0.5, split=True),
    Rehearsal(_MIDDLE, "prefill", tokens=256, codec="int4:32"),
    Rehearsal(_SMALL, "decode", 1024, dtype="float32", share=0.5, split=True),
    Rehearsal(_SMALL, "decode", 1024, dtype="float32", split=True),
    Rehearsal(_WIDE, "prefill", tokens=96, share=0.5, split=True),
    Rehearsal(_WIDE, "prefill", tokens=96, split=True),
)

EVALUATION: tuple[Rehearsal, ...] = (
    Rehearsal(_TESTED, "decode", 1024),
    Rehearsal(_TESTED, "decode", 1024, share=0.6, split=True),
    Rehearsal(_TESTED, "decode", 512, share=0.3, split=True),
    Rehearsal(_TESTED, "decode", 512, batch=4, share=0.6, split=True),
    Rehearsal(_TESTED, "prefill", tokens=256),
    Rehearsal(_TESTED, "prefill", tokens=128, share=0.3, split=True),
    Rehearsal(_TESTED, "vision", side=320),
    Rehearsal(_TESTED, "decode", 512, codec="int8"),
    Rehearsal(_TESTED, "decode", 512, codec="int4:32", share=0.5, split=True),
    Rehearsal(_TESTED_SPARSE, "decode", 512, share=0.5, split=True),
    Rehearsal(_OTHER, "prefill", tokens=256, codec="int8"),
    Rehearsal(_OTHER, "decode", 2048),
    Rehearsal(_OTHER, "decode", 512, share=0.5, split=True),
    Rehearsal(_OTHER, "decode", 2048, in_blocks=True, share=0.6, split=True),
    Rehearsal(_OTHER, "prefill", tokens=96, side=256),
    Rehearsal(_OTHER, "prefill", tokens=384),
    Rehearsal(_OTHER, "prefill", tokens=384, share=0.5, split=True),
    Rehearsal(_OTHER, "decode", 512, dtype="float32"),
)


def trial_of(one: Rehearsal, machine: Machine) -> Trial:
    """A rehearsal as a program with its plan."""
    found = traced(one)
    return make_trial(
        one.name,
        one.shape.name,
        found.program,
        found.kernels,
        machine,
        share=one.share,
        values=_values(one),
    )


def traced(one: Rehearsal) -> Traced:
    """A rehearsal as a program."""
    config, dtype = config_of(one.shape), np.dtype(one.dtype)
    codecs = {} if one.codec == "raw" else everywhere(config, one.codec)
    encodings = encodings_of(config, codecs, lambda entry: dtype) if codecs else {}
    config = as_encoded(config, encodings)
    work, rows = _work(one, config, dtype), vocab_rows(config, dtype)
    network = shape_network(config, dtype=dtype, vocab_rows=rows, encodings=encodings)
    granularity = finest(config) if one.split else WHOLE_LAYERS
    known = (long_phases if one.in_blocks else phases)(config, granularity)
    return trace_phase(known[work.phase], network, work.arrays)


def config_of(shape: Shape) -> Config:
    """A config of the released models' family in this shape."""
    family = load_config(MODELS / (SPARSE if shape.experts else DENSE))
    text: TextConfig = dataclasses.replace(
        family.text,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        moe_intermediate_size=shape.inner if shape.experts else 0,
        num_experts=shape.experts,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=HEAD_DIM,
        num_hidden_layers=shape.layers,
        vocab_size=shape.vocab,
    )
    vision: VisionConfig = dataclasses.replace(
        family.vision,
        hidden_size=shape.tower,
        intermediate_size=4 * shape.tower,
        num_heads=shape.tower // 64,
        depth=shape.depth,
        out_hidden_size=shape.hidden,
        deepstack_visual_indexes=(1, 2),
    )
    return dataclasses.replace(family, text=text, vision=vision)


def _work(one: Rehearsal, config: Config, dtype: np.dtype) -> Work:
    images = ((one.side, one.side),) if one.side else ()
    tokens = one.tokens if one.phase == "prefill" else 1
    context = max(one.context, tokens + 1)
    slots = None
    if one.in_blocks:
        slots = block_shape(config.text, one.batch, row_dtype(one.kv, dtype))[2]
    request = Request(
        tokens,
        1,
        images,
        one.batch,
        None if images else context,
        block_slots=slots,
        kv=one.kv,
    )
    return next(work for work in works_of(config, request, dtype) if work.phase == one.phase)


def _values(one: Rehearsal) -> Mapping[str, Any]:
    """New tokens go to the last slots of the cache."""
    if one.phase == "vision":
        return {}
    return {"start": 0 if one.side else max(0, one.context - one.tokens)}
