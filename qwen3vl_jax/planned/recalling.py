"""A prompt cache for a model: what is predicted to be faster, and room within the budgets.

keep_prompts(model, path, directory) lets a model keep what it computes of prompts.
"""

import itertools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib

from memsched.cost import CostModel
from memsched.detection.calibrated import calibrated, hardware_identity
from memsched.detection.this_machine import detect
from memsched.errors import MemschedError, ProgramError, StoreError
from memsched.machine import DEVICE, NVME, Machine
from memsched.plan import Copy, Run
from memsched.profiles import load_machine, write_machine
from memsched.program import ArraySpec, Program
from memsched.sizes import parse_size
from memsched.tracing.steps import Known
from qwen3vl_jax import __version__, kernels
from qwen3vl_jax.cache import KVCache
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.long_phases import long_phases
from qwen3vl_jax.model import Qwen3VL
from qwen3vl_jax.network import empty_features
from qwen3vl_jax.phases import Phase, phases
from qwen3vl_jax.planned.programs import trace_phase
from qwen3vl_jax.planned.replanning import staying_beside
from qwen3vl_jax.planned.runner import PlannedRunner
from qwen3vl_jax.planned.shapes import CacheShapes
from qwen3vl_jax.prompt_cache import PromptCache
from qwen3vl_jax.prompt_files import Entries
from qwen3vl_jax.prompt_keys import digest, weights_digest

SPACE_BYTES = 4_000_000_000
MEASURE_S = 0.1  # of disk and processor, once for a directory, if no plan has measured them


def keep_prompts(
    model: Qwen3VL,
    path: str | Path,
    directory: str | Path,
    space: int | str | None = None,
    *,
    encoded_by: tuple[str | None, str] = (None, "minimal"),
    warn: Callable[[str], None] = warnings.warn,
) -> None:
    """Lets a model keep what it computes of prompts in a directory, and look there before.

    Args:
        path: the checkpoint that it was loaded from.
        space: bytes, or text like "1.5GiB"; what was used longest ago goes first.
        encoded_by: the codec and the level by which its weights were encoded in memory.
        warn: gets one line when an entry is damaged or cannot be written.

    Raises:
        UsageError, StorageError: as `entries_in`.
        WeightError, StorageError: the checkpoint cannot be read.
    """
    entries = entries_in(directory, space)
    identity = digest(weights_digest(Path(path)), encoded_by, *_computed_by(model))
    try:
        forecaster = Forecaster(model, *_rates(model, Path(directory)))
    except MemschedError as error:
        warn(f"prompt cache: {error}; it is not used")
        return
    model.prompt_cache = PromptCache(entries, identity, forecaster, warn)


def entries_in(directory: str | Path, space: int | str | None) -> Entries:
    """The directory of a prompt cache, of so many bytes.

    Raises:
        UsageError: a directory that is not the user's own, or no space.
        StorageError: it cannot be made.
    """
    nbytes = parse_size(space) if isinstance(space, str) else space
    nbytes = SPACE_BYTES if nbytes is None else nbytes
    if nbytes <= 0:
        raise UsageError(f"a prompt cache of {nbytes:,} B holds nothing; give it some space")
    return Entries(Path(directory), nbytes)


def _computed_by(model: Qwen3VL) -> tuple[object, ...]:
    """Whatever else may decide the last bit of a sum."""
    device = jax.local_devices()[0]
    versions = __version__, jax.__version__, jaxlib.__version__, os.environ.get("XLA_FLAGS")
    where = device.platform, device.device_kind, hardware_identity(), kernels.usable()
    planned = model.runner if isinstance(model.runner, PlannedRunner) else None
    encodings = repr(planned.encodings) if planned else None  # budgets may decide them
    of_model = model.config, str(model.dtype), encodings, model.runner.chunk_tokens
    return (*versions, *where, *of_model)


def _rates(model: Qwen3VL, directory: Path) -> tuple[Machine, CostModel]:
    """Those of the plans; else what is calibrated, or was measured here once on such a machine."""
    runner = model.runner
    if isinstance(runner, PlannedRunner):
        return runner.machine, runner.cost
    file = directory / f"{hardware_identity()}-{jax.local_devices()[0].platform}.toml"
    try:
        machine = load_machine(file)
    except ProgramError:
        machine = _measured(directory, file)
    return calibrated(machine)


def _measured(directory: Path, file: Path) -> Machine:
    """A machine that a file describes from now on, or with rates that are assumed."""
    try:
        machine = detect(directory, measure_s=MEASURE_S)
        write_machine(machine, file)
    except StoreError:  # a full disk is no reason not to read from it
        return detect(directory, measure_s=0.0)
    return machine


class Forecaster:
    """Predicts by the cost model what the items of a prompt cache take; see `Estimates`."""

    def __init__(self, model: Qwen3VL, machine: Machine, cost: CostModel) -> None:
        self._model = model
        self._machine = machine
        self._cost = cost
        self._known = Known()
        self._programs: dict[Any, Program] = {}

    def restoring_s(self, nbytes: int) -> float:
        """Over every link from the disk to the device."""
        machine, cost = self._machine, self._cost
        entry = Program({"entry": ArraySpec("entry", (nbytes,), "uint8", "input")}, (), ())
        tiers = [tier.name for tier in reversed(machine.tiers)]
        return sum(
            cost.seconds(Copy("entry", source, target), entry, machine)
            for source, target in itertools.pairwise(tiers)
        )

    def chunk_s(self, tokens: int, cache: KVCache) -> float:
        """One pass of the phase "prefill"."""
        kind = self._model.config, self._model.dtype, jax.tree.leaves(cache.layers)[0].dtype
        shapes = CacheShapes(*kind, cache.batch, cache.capacity, cache.block_slots)
        return self._seconds(
            self._phase("prefill", blocks=cache.block_slots is not None), shapes.prefill(tokens)
        )

    def piece_s(self, piece: Any, rows: int) -> float:
        """One pass of the phase "vision"."""
        config, dtype = self._model.config, self._model.dtype
        features = jax.eval_shape(lambda: empty_features(rows, config, dtype))
        return self._seconds(self._phase("vision"), (features, piece))

    def make_room(self, nbytes: int, beside: Any) -> bool:
        """Weights leave where plans have filled the memory with them; the next plan brings them."""
        runner = self._model.runner
        if not isinstance(runner, PlannedRunner):
            return True
        arrays = [leaf for leaf in jax.tree.leaves(beside) if isinstance(leaf, jax.Array)]
        with runner.passing:
            used_bytes = {tier.name: nbytes for tier in runner.machine.tiers}
            used_bytes[DEVICE] += runner.timetable.cache_bytes + runner.timetable.others_bytes
            used_bytes[DEVICE] += sum(array.nbytes for array in arrays)
            if any(used_bytes[t.name] > t.capacity_bytes for t in runner.machine.tiers[:-1]):
                return False
            held = runner.executor.held
            stay = staying_beside(held, runner.specs, runner.machine, used_bytes)
            if len(stay) < len(held):
                runner.move(stay, ())
            return True

    def _phase(self, name: str, *, blocks: bool = False) -> Phase:
        """As finely cut as the runner's own."""
        runner, config = self._model.runner, self._model.config
        if isinstance(runner, PlannedRunner):
            return runner.timetable.known_phases(blocks=blocks)[name]
        return (long_phases(config) if blocks else phases(config))[name]

    def _seconds(self, phase: Phase, arrays: Any) -> float:
        """The longer of computing, and of bringing those weights that do not lie in memory.

        That is what plans come near to, and no plan is faster.
        """
        leaves = jax.tree.leaves(arrays)
        key = phase.name, str([(leaf.shape, leaf.dtype) for leaf in leaves])
        if key not in self._programs:
            traced = trace_phase(phase, self._model.network, arrays, self._known)
            self._programs[key] = traced.program
        program = self._programs[key]
        runs = [Run(step.name) for step in program.steps]
        computing_s = sum(self._cost.seconds(run, program, self._machine) for run in runs)
        return max(computing_s, self._streaming_s(program))

    def _streaming_s(self, program: Program) -> float:
        runner = self._model.runner
        if not isinstance(runner, PlannedRunner):
            return 0.0
        held = {rest.array for rest in runner.executor.held}
        read = {name for step in program.steps for name in step.reads} - held
        weights = [program.arrays[name] for name in read if program.arrays[name].kind == "weight"]
        link = runner.machine.link(NVME, runner.machine.tiers[-2].name)
        return 0.0 if link is None else sum(w.nbytes for w in weights) / link.bytes_per_s
