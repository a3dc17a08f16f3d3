"""The names of all weights: Hugging Face tensor <-> our array, complete both ways.

Our path is the tensor's name without a leading "model.", with two differences:

* experts: `...mlp.experts.gate_up_proj` [E, 2I, H] becomes `...mlp.experts.{e}.gate_up_proj`
  [2I, H] for each expert e, always [out, in] (`down_proj` is [H, I]);
* the vocabulary matrices become row blocks: `...embed_tokens.weight.{b}`, `lm_head.weight.{b}`.

Letters: h vision width, v vision MLP width, m = 4h width of four merged patches, H text width,
I MLP width, E experts, V vocabulary.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from qwen3vl_jax.config import Config, TextConfig, VisionConfig
from qwen3vl_jax.errors import UsageError, WeightError

ARRAYS = 1_000_000
Shapes = dict[str, tuple[int, ...]]
# How vocabulary matrices are cut: into blocks of so many rows, of which the last has the rest, or
# of all these; None leaves them whole.
Rows = int | tuple[int, ...] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One array of the model and the tensor that it comes from.

    `shape` is that of the array. `expert` picks a slice of the tensor's first axis; `rows` is a
    half-open range of rows of a vocabulary matrix, None when the entry is the whole of it.
    """

    path: str
    hf_name: str
    shape: tuple[int, ...]
    expert: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def array(self) -> str:
        """Name of the array in a store, where vocabulary matrices are whole."""
        return self.path if self.rows is None else self.path.rpartition(".")[0]


def table(config: Config, *, vocab_rows: Rows = None) -> tuple[Entry, ...]:
    """Every array of the model once: vision, embedding, layers, norm, head.

    Args:
        vocab_rows: how the vocabulary matrices are cut.
    """
    return tuple(_split(arrays(config), config.text.vocab_size, vocab_rows))


def row_blocks(vocab_size: int, rows: Rows) -> tuple[tuple[int, int], ...]:
    """Half-open ranges that cut `vocab_size` rows into blocks.

    Raises:
        UsageError: if a block has less than 1 row, or all of them have not `vocab_size`.
    """
    if isinstance(rows, tuple):
        if min(rows, default=0) < 1 or sum(rows) != vocab_size:
            raise UsageError(
                f"vocab_rows are {sum(rows):,} in blocks of {min(rows, default=0):,} and more, "
                f"wanted {vocab_size:,} in blocks of at least 1; choose others"
            )
        return tuple(itertools.pairwise(itertools.accumulate(rows, initial=0)))
    if rows is not None and rows < 1:
        raise UsageError(f"vocab_rows is {rows}, wanted at least 1; choose another")
    size = vocab_size if rows is None else rows
    return tuple((first, min(first + size, vocab_size)) for first in range(0, vocab_size, size))


def block_rows(vocab_size: int, blocks: int) -> int:
    """Rows of a block when `vocab_size` rows are cut into `blocks`, or fewer, of equal size.

    Raises:
        UsageError: if `blocks` is below 1 or above `vocab_size`.
    """
    if not 1 <= blocks <= vocab_size:
        raise UsageError(f"vocab_blocks is {blocks}, wanted 1 to {vocab_size:,}; choose another")
    return -(-vocab_size // blocks)


def arrays(config: Config) -> tuple[Entry, ...]:
    """As `table`, with whole vocabulary matrices: the arrays of a store."""
    text = config.text
    if 2 * text.num_experts * text.num_hidden_layers > ARRAYS:
        raise WeightError(
            f"config: {text.num_experts:,} experts in {text.num_hidden_layers:,} layers make more "
            f"than {ARRAYS:,} arrays; check config.json"
        )
    found = []
    for name, shape in hf_shapes(config).items():
        path = name.removeprefix("model.")
        if ".mlp.experts." not in name:
            found.append(Entry(path, name, shape))
            continue
        parent, _, kind = path.rpartition(".")
        for expert in range(shape[0]):
            found.append(Entry(f"{parent}.{expert}.{kind}", name, shape[1:], expert=expert))
    return tuple(found)


def hf_shapes(config: Config) -> Shapes:
    """Tensor name -> shape of a Hugging Face checkpoint, complete; experts as [E, out, in]."""
    text = config.text
    matrix = (text.vocab_size, text.hidden_size)
    shapes = {f"model.visual.{name}": shape for name, shape in _vision(config.vision).items()}
    shapes["model.language_model.embed_tokens.weight"] = matrix
    for layer in range(text.num_hidden_layers):
        prefix = f"model.language_model.layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in _layer(text, layer).items()}
    shapes["model.language_model.norm.weight"] = (text.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = matrix
    return shapes


def _vision(vision: VisionConfig) -> Shapes:
    h, m = vision.hidden_size, vision.hidden_size * vision.merged_patches
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    shapes: Shapes = {
        "patch_embed.proj.weight": (h, *patch),
        "patch_embed.proj.bias": (h,),
        "pos_embed.weight": (vision.num_position_embeddings, h),
    }
    for block in range(vision.depth):
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in _vision_block(vision).items()}
    mergers = {"merger.": h}
    mergers |= {
        f"deepstack_merger_list.{k}.": m for k in range(len(vision.deepstack_visual_indexes))
    }
    for prefix, norm in mergers.items():
        merger = _merger(norm, m, vision.out_hidden_size)
        shapes |= {prefix + name: shape for name, shape in merger.items()}
    return shapes


def _vision_block(vision: VisionConfig) -> Shapes:
    h, v = vision.hidden_size, vision.intermediate_size
    return {
        "norm1.weight": (h,),
        "norm1.bias": (h,),
        "attn.qkv.weight": (3 * h, h),
        "attn.qkv.bias": (3 * h,),
        "attn.proj.weight": (h, h),
        "attn.proj.bias": (h,),
        "norm2.weight": (h,),
        "norm2.bias": (h,),
        "mlp.linear_fc1.weight": (v, h),
        "mlp.linear_fc1.bias": (v,),
        "mlp.linear_fc2.weight": (h, v),
        "mlp.linear_fc2.bias": (h,),
    }


def _merger(norm: int, m: int, out: int) -> Shapes:
    return {
        "norm.weight": (norm,),
        "norm.bias": (norm,),
        "linear_fc1.weight": (m, m),
        "linear_fc1.bias": (m,),
        "linear_fc2.weight": (out, m),
        "linear_fc2.bias": (out,),
    }


def _layer(text: TextConfig, layer: int) -> Shapes:
    H, I = text.hidden_size, text.intermediate_size  # noqa: E741
    E, expert = text.num_experts, text.moe_intermediate_size
    queries = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    shapes: Shapes = {
        "input_layernorm.weight": (H,),
        "self_attn.q_proj.weight": (queries, H),
        "self_attn.k_proj.weight": (keys, H),
        "self_attn.v_proj.weight": (keys, H),
        "self_attn.o_proj.weight": (H, queries),
        "self_attn.q_norm.weight": (text.head_dim,),
        "self_attn.k_norm.weight": (text.head_dim,),
        "post_attention_layernorm.weight": (H,),
    }
    if text.attention_bias:
        shapes |= {
            "self_attn.q_proj.bias": (queries,),
            "self_attn.k_proj.bias": (keys,),
            "self_attn.v_proj.bias": (keys,),
            "self_attn.o_proj.bias": (H,),
        }
    if text.is_sparse(layer):
        return shapes | {
            "mlp.gate.weight": (E, H),
            "mlp.experts.gate_up_proj": (E, 2 * expert, H),
            "mlp.experts.down_proj": (E, H, expert),
        }
    return shapes | {
        "mlp.gate_proj.weight": (I, H),
        "mlp.up_proj.weight": (I, H),
        "mlp.down_proj.weight": (H, I),
    }


def _split(whole: tuple[Entry, ...], vocab_size: int, vocab_rows: Rows) -> Iterator[Entry]:
    for entry in whole:
        if entry.hf_name not in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            yield entry
            continue
        for block, rows in enumerate(row_blocks(vocab_size, vocab_rows)):
            shape = (rows[1] - rows[0], entry.shape[1])
            yield Entry(f"{entry.path}.{block}", entry.hf_name, shape, rows=rows)
