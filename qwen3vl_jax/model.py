"""The model as its users see it: logits and cached generation, over the phases of `phases`.

A runner carries them out. The plain one has all weights on a device and calls step after step,
layer by layer: equal layers share one compiled program, so a new shape compiles in the time of one
layer, at the same speed as one program for the whole model (DECISIONS.md).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from qwen3vl_jax import text
from qwen3vl_jax.buckets import PREFILL_CHUNK, bucket
from qwen3vl_jax.cache import KVCache
from qwen3vl_jax.cache_forms import check_room, empty_cache, larger, shortened
from qwen3vl_jax.checkpoints.encodings import resting_bytes
from qwen3vl_jax.config import Config
from qwen3vl_jax.encoded import Encoded
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.generation_settings import GenerationSettings, load_settings
from qwen3vl_jax.inputs import SMALLEST_TOKENS, cut, prepare
from qwen3vl_jax.long_cache import with_room
from qwen3vl_jax.long_phases import long_phases
from qwen3vl_jax.network import (
    Features,
    Qwen3VLNetwork,
    abstract_network,
    named_arrays,
    network_from_arrays,
)
from qwen3vl_jax.parameters import Source, draw_all, named_dtype, read_all, source_of
from qwen3vl_jax.phases import Direct, Runner, phases
from qwen3vl_jax.prefill import chunk_of, encode, prefill
from qwen3vl_jax.progress import Display
from qwen3vl_jax.prompt_cache import PromptCache, Recall
from qwen3vl_jax.weights import block_rows, table


class Qwen3VL:
    """A Qwen3-VL, dense or sparse. All its weights are on the default device, or with a runner."""

    def __init__(
        self,
        config: Config,
        network: Qwen3VLNetwork,
        settings: GenerationSettings,
        *,
        runner: Runner | None = None,
    ) -> None:
        """Joins what belongs together. A `runner` has the weights, and `network` may then be
        abstract; by default `network` has them.
        """
        self.config = config
        self.network = network
        self.settings = settings
        self._runner = Direct(network) if runner is None else runner
        self._phases = phases(config)
        self._long_phases = long_phases(config)
        self.prompt_cache: PromptCache | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str | None = None,
        vocab_blocks: int = 1,
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
        nvme_dir: str | Path | None = None,
        nvme_space: int | str | None = None,
        level: str = "minimal",
        machine: str | Path | None = None,
        max_context: int | None = None,
        codec: str | None = None,
        plan_seconds: float | None = None,
        prompt_cache: str | Path | None = None,
        prompt_cache_space: int | str | None = None,
        kv: str | None = None,
        kv_blocks: str = "needed",
        chunk: int | str = PREFILL_CHUNK,
        display: Display | None = None,
    ) -> "Qwen3VL":
        """Loads a Hugging Face directory, a converted store or an Orbax checkpoint, array by array.

        With a budget nothing is loaded: weights stay in their files, and plans bring them as they
        are needed. Without one that happens where the weights do not fit what is free.

        Args:
            dtype: float32, bfloat16 or float16; None keeps what config.json says.
            vocab_blocks: row blocks of the vocabulary matrices, for devices that limit the size of
                one array. Plans choose their own.
            device_memory: bytes, or text like "1.5GiB", for weights, caches and all that steps
                need; not for Python and JAX themselves.
            host_memory: the same for main memory beside an accelerator.
            nvme_dir: where arrays are moved out to, if a plan has to.
            nvme_space: how much of it; reserved at once.
            level: how far values may be changed to save memory: "minimal" changes no bit,
                "balanced" and "aggressive" encode raw weights by their budgets of error. With
                limits that is done once, into a store in `nvme_dir`; it counts as `nvme_space`.
            machine: a file that describes the machine, in place of measuring this one.
            max_context: tokens for which every cache shall have room; more are refused.
            codec: encodes layers and head while they are read, as scripts/convert.py --codec.
            plan_seconds: plans are tried for about so long; by default 1.
            prompt_cache: a directory where generation keeps what it computes of prompts, and looks
                for it; answers stay the same.
            prompt_cache_space: how much of that; by default 4 GB.
            kv: how caches are stored: "raw", or "int8" in half the bytes; None: as the level says.
            kv_blocks, chunk: as --kv-blocks and --chunk of scripts. They change bits, as a larger
                batch does. What is left to plans is planned.
            display: shows how an encoded store is made (`progress`); by default on a terminal only.

        Raises:
            ConfigError, WeightError: the checkpoint is not a complete Qwen3-VL.
            StorageError: it cannot be read.
            UsageError: budgets that make no sense, or weights that cannot be read in place.
        """
        from qwen3vl_jax.planned.loading import Budgets, load
        from qwen3vl_jax.planned.recalling import keep_prompts

        memory = (device_memory, host_memory, nvme_dir, nvme_space)
        budgets = Budgets(*memory, level, machine, max_context, plan_seconds, kv, kv_blocks, chunk)
        model = None
        if not budgets.asked:
            source = source_of(path, dtype, codec, level)
            forms = {"kv": budgets.forms["kv"], "chunk_tokens": chunk}
            model = cls._of_memory(source, load_settings(path), vocab_blocks, forms)
        model = model or load(path, dtype=dtype, budgets=budgets, codec=codec, display=display)
        if prompt_cache is not None:
            keep_prompts(model, path, prompt_cache, prompt_cache_space, encoded_by=(codec, level))
        return model

    @classmethod
    def _of_memory(
        cls, source: Source, settings: GenerationSettings, vocab_blocks: int, forms: Any
    ) -> "Qwen3VL | None":
        """A model with all weights in memory; None if they do not fit what is free."""
        from qwen3vl_jax.planned.loading import fits

        rows = block_rows(source.config.text.vocab_size, vocab_blocks)
        entries = table(source.config, vocab_rows=rows)
        if not fits(resting_bytes(entries, source.encodings, source.dtype)):
            return None
        empty = abstract_network(source.config, dtype=source.dtype, vocab_rows=rows)
        network = network_from_arrays(empty, read_all(source, entries))
        return cls(source.config, network, settings, runner=Direct(network, **forms))

    @classmethod
    def random(
        cls, config: Config, *, dtype: str = "float32", seed: int = 0, vocab_blocks: int = 1
    ) -> "Qwen3VL":
        """Weights drawn at random, with activations of ordinary size. For tests and benchmarks."""
        chosen = named_dtype(dtype)
        rows = block_rows(config.text.vocab_size, vocab_blocks)
        empty = abstract_network(config, dtype=chosen, vocab_rows=rows)
        arrays = draw_all(named_arrays(empty), chosen, seed)
        return cls(config, network_from_arrays(empty, arrays), GenerationSettings())

    @property
    def runner(self) -> Runner:
        """What carries out the phases."""
        return self._runner

    @property
    def plan(self) -> Any:
        """What the plans do: `.report()` is a text, `.to_dict()` data.

        Raises:
            UsageError: the model has none; all its weights are in memory.
        """
        from qwen3vl_jax.planned.reporting import PlanReport
        from qwen3vl_jax.planned.runner import PlannedRunner

        if not isinstance(self._runner, PlannedRunner):
            raise UsageError(
                "all weights of this model are in memory, and no plan moves them; "
                "give from_pretrained a budget, such as device_memory"
            )
        return PlanReport(self._runner, prompt_cache=self.prompt_cache)

    @property
    def parameters(self) -> dict[str, Array | Encoded]:
        """Every weight under its path."""
        return named_arrays(self.network)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of all weights and activations."""
        return np.dtype(self.network.language_model.norm.weight.get_value().dtype)

    def __call__(self, **inputs: Any) -> Float[Array, "B T V"]:
        """Scores of the next token at every position, float32; garbage at padding.

        Args:
            inputs: `input_ids` [B, T], and as in transformers `attention_mask`, `pixel_values`,
                `mm_token_type_ids`, `image_grid_thw`, `pixel_values_videos`, `video_grid_thw`.

        Raises:
            UsageError: arrays that do not belong together.
        """
        batch, _ = prepare(self.config, inputs, pictures=False)
        count = batch.tokens.input_ids.shape[1]
        tokens = cut(batch.tokens, 0, count, bucket(count, SMALLEST_TOKENS))
        features = self.encode(inputs)
        x = self._runner.embed(tokens.input_ids)
        positions, rows, valid = tokens.positions, tokens.feature_rows, tokens.valid
        return self.run_phase("forward", x, positions, rows, features, valid)[:, :count]

    def new_cache(
        self,
        *,
        batch: int,
        capacity: int,
        block_slots: int | None = None,
        prompt_tokens: int | None = None,
    ) -> KVCache:
        """An empty KV cache for `batch` rows of at least `capacity` tokens.

        Args:
            block_slots: makes one in blocks of so many tokens; by default a model does that whose
                plans have no room for a plain one.
            prompt_tokens: those that each row is about to get, for what is chosen by prediction.
        """
        form = self._runner.expect(batch, capacity, prompt_tokens)
        if block_slots is not None:
            form = dataclasses.replace(form, block_slots=block_slots)
        return empty_cache(self.config.text, form)

    def recall(self, inputs: Mapping[str, Any], cache: KVCache | None) -> Recall | None:
        """What the prompt cache has for these inputs; None without one.

        Args:
            cache: what they shall go into; None, or one that is not empty, if they follow others.

        Raises:
            UsageError: arrays that do not belong together.
        """
        if self.prompt_cache is None:
            return None
        if cache is None or cache.length > 0:
            self.prompt_cache.latest = None
            return None
        return self.prompt_cache.recall(self.config, inputs, cache, chunk_of(cache, self._runner))

    def encode(self, inputs: Mapping[str, Any], *, recall: Recall | None = None) -> Features | None:
        """Runs all pictures and videos of `inputs` through the vision tower; None without any.

        Args:
            recall: leaves out what need not be computed because the prompt cache has it.

        Raises:
            UsageError: pixels and grids that do not belong together.
        """
        return encode(self, inputs, recall)

    def prefill(
        self,
        inputs: Mapping[str, Any],
        cache: KVCache,
        *,
        features: Features | None = None,
        chunk_tokens: int | None = None,
        recall: Recall | None = None,
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Takes in new tokens; returns the scores after each row's last real one, and the next
        cache.

        May follow earlier tokens: `inputs` then holds the new ones only. The given cache is
        consumed.

        Args:
            features: what `encode` returned for these inputs; computed here when None.
            chunk_tokens: how many tokens pass through the layers at once; None: as was chosen.
            recall: what `recall` returned for these inputs and this cache; with the features that
                `encode` made for it.

        Raises:
            UsageError: the cache has no room, or the arrays do not belong together.
        """
        return prefill(self, inputs, cache, features, chunk_tokens, recall)

    def decode(
        self, token_ids: Int[np.ndarray, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Takes in one token for each row; returns the scores of the next one, and the next cache.

        Raises:
            UsageError: the cache is full.
        """
        scores, cache = self._decode("decode", np.asarray(token_ids)[:, None], cache)
        return text.scores_at(scores, np.int32(0)), cache

    def verify(
        self, token_ids: Int[np.ndarray, "B T"], cache: KVCache
    ) -> tuple[Float[Array, "B T V"], KVCache]:
        """Takes in T tokens for each row, some of them on trial, in one pass through the layers.

        What turns out wrong is taken back with `forget`.

        Returns:
            Scores of the next token after each of them, and the next cache.

        Raises:
            UsageError: the cache has no room.
        """
        return self._decode("verify", token_ids, cache)

    def forget(self, cache: KVCache, tokens: int) -> KVCache:
        """The cache without the last `tokens` tokens of every row, all of them real ones."""
        return shortened(cache, tokens)

    def grown(self, cache: KVCache, capacity: int) -> KVCache:
        """The same contents in at least `capacity` slots; a cache that had to grow is consumed.

        Raises:
            UsageError, memsched.errors.DoesNotFitError: as for `new_cache`.
        """
        return cache if capacity <= cache.capacity else larger(cache, capacity, self._runner)

    def set_memory(
        self, *, device_memory: int | str | None = None, host_memory: int | str | None = None
    ) -> None:
        """Changes the budgets of a model that has plans, from its next pass on.

        Answers and caches stay as they are; what `kv_blocks` and `chunk` leave open is chosen anew
        for later caches. May be called between tokens (by a streamer, or between pieces of a chat's
        answer), and by other threads: it waits for the pass under way, and gives back what must go.

        Args:
            device_memory: bytes, or text like "1.5GiB", as in `from_pretrained`; None: as it is.
            host_memory: the same for main memory beside an accelerator.

        Raises:
            UsageError: the model has no plans: all its weights are in memory. Or it is no size.
            memsched.errors.DoesNotFitError: too little for the answer under way. It has the least
                that would do, and the old budgets stay in force.
        """
        from qwen3vl_jax.planned.loading import Budgets, set_memory

        set_memory(self, Budgets(device_memory=device_memory, host_memory=host_memory))

    def wait(self) -> None:
        """Returns when all weights that rest in memory are there."""
        self._runner.wait()

    def close(self) -> None:
        """Gives back what plans hold: threads, files and memory. Weights in memory stay."""
        self._runner.close()

    def generate(
        self, *, streamer: Any = None, tokenizer: Any = None, **arguments: Any
    ) -> Int[np.ndarray, "B tokens"]:
        """Continues the prompt of the inputs, as transformers' `generate` does.

        Args:
            streamer: gets the prompt, then every token; transformers' streamers fit.
            tokenizer: needed for `stop_strings` only.
            arguments: the inputs, and settings of `GenerationSettings` such as `max_new_tokens`;
                what is not given comes from the checkpoint's generation_config.json.

        Returns:
            Prompt and new tokens of every row; rows that end early are filled with padding.

        Raises:
            UsageError: a setting that does not exist or is out of range, or unfitting inputs.
        """
        from qwen3vl_jax.generation import generate, split_arguments

        inputs, given = split_arguments(arguments)
        settings = self.settings.override(**given)
        return generate(self, inputs, settings, streamer=streamer, tokenizer=tokenizer)

    def run_phase(self, phase: str, *arrays: Any, blocks: bool = False) -> Any:
        """Carries out a phase; with `blocks`, that for a cache in blocks."""
        known = self._long_phases if blocks else self._phases
        return self._runner.run(known[phase], *arrays)

    def _decode(
        self, phase: str, token_ids: Int[np.ndarray, "B T"], cache: KVCache
    ) -> tuple[Float[Array, "B T V"], KVCache]:
        batch, tokens = token_ids.shape
        check_room(batch, tokens, cache, one_pass=True)
        cache = with_room(cache, self._runner.seal)
        columns = cache.next_position[:, None] + np.arange(tokens, dtype=np.int32)
        scores, layers, valid = self.run_phase(
            phase,
            self._runner.embed(token_ids.astype(np.int32)),
            np.broadcast_to(columns, (3, batch, tokens)),
            *cache.parts,
            np.ones((batch, tokens), bool),
            np.array(cache.length, np.int32),
            blocks=cache.full is not None,
        )
        after = cache.after(tokens, layers, valid)
        return scores, dataclasses.replace(after, next_position=cache.next_position + tokens)
