"""A model whose weights stay where they are, until a plan brings them.

model = load(path, dtype=None, budgets=Budgets(device_memory="1.5GB"))
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memsched.cost import CostModel
from memsched.detection.calibrated import calibrated, cost_of
from memsched.detection.this_machine import detect, with_limits
from memsched.machine import DEVICE, HOST, NVME, Machine
from memsched.profiles import load_machine
from memsched.sizes import parse_size
from memsched.stores import heap
from memsched.stores.blocks import Block, StoredArray
from qwen3vl_jax.buckets import PREFILL_CHUNK
from qwen3vl_jax.checkpoints.opening import Checkpoint, described, open_checkpoint
from qwen3vl_jax.checkpoints.selection import level_of
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import UsageError
from qwen3vl_jax.generation_settings import load_settings
from qwen3vl_jax.model import Qwen3VL
from qwen3vl_jax.parameters import kv_of, named_dtype
from qwen3vl_jax.planned.encoded_store import Place, encoded_store
from qwen3vl_jax.planned.granularity import WORKING_BYTES, choose_granularity, vocab_blocks
from qwen3vl_jax.planned.options import ALWAYS, FASTER, LEVELS, NEEDED, check_forms, leaves_open
from qwen3vl_jax.planned.rows import EmbeddingRows
from qwen3vl_jax.planned.runner import PlannedRunner
from qwen3vl_jax.planned.shapes import check_context
from qwen3vl_jax.planned.skeleton import shape_network
from qwen3vl_jax.progress import Display, on_terminal
from qwen3vl_jax.weights import Entry, arrays, row_blocks, table

MEASURE_S = 0.3


@dataclasses.dataclass(frozen=True, slots=True)
class Budgets:
    """What a user allows. None is what is free; sizes are bytes or text like "1.5GiB"."""

    device_memory: int | str | None = None
    host_memory: int | str | None = None
    nvme_dir: str | Path | None = None
    nvme_space: int | str | None = None
    level: str = "minimal"
    machine: str | Path | None = None
    max_context: int | None = None
    plan_seconds: float | None = None
    kv: str | None = None
    kv_blocks: str = NEEDED
    chunk: int | str = PREFILL_CHUNK

    def __post_init__(self) -> None:
        check_forms(self.kv_blocks, self.chunk)

    @property
    def asked(self) -> bool:
        """Whether anything is limited or left to plans, so that a plan is wanted."""
        if leaves_open(self.kv_blocks, self.chunk):
            return True
        usual: dict[str, Any] = {"plan_seconds": None, "level": "minimal", "kv": None}
        usual |= {"kv_blocks": NEEDED, "chunk": PREFILL_CHUNK}
        return dataclasses.replace(self, **usual) != Budgets()

    @property
    def forms(self) -> dict[str, Any]:
        """As the arguments `kv`, `kv_blocks` and `chunk` of `Request` and of runners."""
        kv = kv_of(self.kv, self.level)
        return {"kv": kv, "kv_blocks": self.kv_blocks, "chunk": self.chunk}


def load(
    path: str | Path,
    *,
    dtype: str | None,
    budgets: Budgets,
    codec: str | None = None,
    display: Display | None = None,
) -> Qwen3VL:
    """A model that keeps within the budgets. `display`, by default for a terminal, shows how an
    encoded store is made.

    Raises:
        UsageError: a budget that makes no sense, or weights that cannot be read in place, which
            those that a codec is given for cannot.
        ConfigError, WeightError: the checkpoint is not a complete Qwen3-VL.
        StorageError: it cannot be read.
    """
    heap.share()
    _check_possible(path, codec, budgets)
    config, encodings = described(path)
    check_context(config, budgets.max_context)
    chosen = named_dtype(config.dtype if dtype is None else dtype)
    machine, cost = machine_and_cost(budgets)
    if budgets.level != "minimal" and not encodings:
        shown = display or on_terminal()
        path, budgets = _encoded(Path(path), config, chosen, machine, cost, budgets, shown)
        config, encodings = described(path)
        machine, cost = machine_and_cost(budgets)
    device_bytes = machine.tier(DEVICE).capacity_bytes
    rows = vocab_blocks(config, chosen, device_bytes, encodings)
    network = shape_network(config, dtype=chosen, vocab_rows=rows, encodings=encodings)
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(path, config))
        entries = table(config, vocab_rows=rows)
        _check_dtype(checkpoint, entries, chosen, path)
        runner = PlannedRunner(
            network,
            config,
            entries,
            machine,
            sources(checkpoint, entries),
            EmbeddingRows(checkpoint, _embedding(config), row_blocks(config.text.vocab_size, rows)),
            encodings=encodings,
            granularity=choose_granularity(config, chosen, device_bytes, encodings),
            nvme_dir=_folder(budgets),
            nvme_space_bytes=_bytes("nvme_space", budgets.nvme_space),
            max_context=budgets.max_context,
            cost=cost,
            plan_seconds=budgets.plan_seconds,
            **budgets.forms,
        )
        runner.owned.push(stack.pop_all())
    return Qwen3VL(config, network, load_settings(path), runner=runner)


def _check_possible(path: str | Path, codec: str | None, budgets: Budgets) -> None:
    """Raises UsageError for what cannot be done with weights that are not all in memory."""
    if codec is not None:
        raise UsageError(
            f"codec={codec!r} needs room for all weights; convert {path} with scripts/convert.py "
            "--codec, and load that"
        )
    check_blocks(budgets)


def check_blocks(budgets: Budgets) -> None:
    """Whether blocks of KV caches that are wanted have a place.

    Raises:
        UsageError: they have none.
    """
    if budgets.kv_blocks in (FASTER, ALWAYS) and budgets.nvme_dir is None:
        raise UsageError(
            f"--kv-blocks {budgets.kv_blocks} keeps full blocks of KV caches on disk; add "
            f"--nvme-dir, or leave it at {NEEDED}"
        )


def _encoded(
    path: Path,
    config: Config,
    dtype: np.dtype,
    machine: Machine,
    cost: CostModel,
    budgets: Budgets,
    display: Display,
) -> tuple[Path, Budgets]:
    """A raw checkpoint as a store of its level, and the budgets that this leaves.

    Raises:
        UsageError: there is no place for one.
        DoesNotFitError, StorageError: there is too little space.
    """
    folder, space = _folder(budgets), _bytes("nvme_space", budgets.nvme_space)
    if folder is None:
        raise UsageError(
            f"level {budgets.level!r} needs a place for the encoded weights, which stream from "
            f"there; add --nvme-dir, or make a store with scripts/convert.py --codec auto --level "
            f"{budgets.level} and load that"
        )
    # Measured rates and what is free differ in every run; what was asked does not.
    limits = _asked(budgets)
    memory = limits.get(DEVICE), limits.get(HOST), budgets.max_context
    asked = machine.digest if budgets.machine else machine.platform
    made = encoded_store(
        path,
        config,
        machine,
        cost,
        dtype=dtype,
        level=level_of(budgets.level),
        place=Place(folder, space, (asked, *memory)),
        max_context=budgets.max_context,
        kv_blocks=budgets.kv_blocks,
        display=display,
    )
    left = None if space is None else space - made.nbytes
    return made.path, dataclasses.replace(budgets, nvme_space=left)


def fits(nbytes: int) -> bool:
    """Whether weights of so many bytes, and what steps need beside them, fit what is free now."""
    device = detect(measure_s=0.0).tier(DEVICE)
    return nbytes + WORKING_BYTES <= device.capacity_bytes


def machine_and_cost(budgets: Budgets) -> tuple[Machine, CostModel]:
    """The machine at hand, or the one of a file, within the budgets, and what was learned of it.

    One that nobody has calibrated is measured for `MEASURE_S`.
    """
    check_level(budgets)
    if budgets.machine is not None:
        machine = load_machine(Path(budgets.machine))
        cost = cost_model(budgets, machine)
    else:
        found = detect(_folder(budgets), measure_s=0.0)
        machine, cost = calibrated(found)
        if machine is found:  # nobody has calibrated it
            machine = detect(_folder(budgets), measure_s=MEASURE_S)
    asked = _asked(budgets)
    if budgets.nvme_dir is None:
        asked.setdefault(NVME, 0)
    return with_limits(machine, asked), cost


def check_level(budgets: Budgets) -> None:
    """Whether there is such a level.

    Raises:
        UsageError: there is not.
    """
    if budgets.level not in LEVELS:
        raise UsageError(f"level {budgets.level!r} is unknown; choose one of {', '.join(LEVELS)}")


def cost_model(budgets: Budgets, machine: Machine) -> CostModel:
    """What was learned of the machine of some budgets, or its rates."""
    return cost_of(machine, None if budgets.machine is None else Path(budgets.machine))


def set_memory(model: Qwen3VL, budgets: Budgets) -> None:
    """Gives a planned model other budgets, from its next pass on.

    Raises:
        UsageError: the model has no plans, or a budget is no size.
        ProgramError: a tier that its machine has not.
        DoesNotFitError: too little for what is under way, with the least that would do. Nothing has
            changed.
        StoreError: no address space for so much.
    """
    runner = planned_runner(model)
    runner.limit(with_limits(runner.machine, _asked(budgets)))


def planned_runner(model: Qwen3VL) -> PlannedRunner:
    """What carries out the plans of a model.

    Raises:
        UsageError: it has none.
    """
    runner = model.runner
    if not isinstance(runner, PlannedRunner):
        raise UsageError(
            "all weights of this model are in memory, and no plan could give any of it back; "
            "give from_pretrained a budget, such as device_memory"
        )
    return runner


def sources(checkpoint: Checkpoint, entries: tuple[Entry, ...]) -> Mapping[str, StoredArray]:
    """Where the bytes of every weight lie."""
    found = {}
    for entry in entries:
        blocks = tuple(
            Block(extent.path, extent.offset, extent.nbytes, extent.used_bytes, extent.checksum)
            for extent in checkpoint.extents(entry)
        )
        found[entry.path] = StoredArray(sum(block.used_bytes for block in blocks), blocks)
    return found


def _embedding(config: Config) -> Entry:
    return next(e for e in arrays(config) if e.path == "language_model.embed_tokens.weight")


def _check_dtype(
    checkpoint: Checkpoint, entries: tuple[Entry, ...], chosen: np.dtype, path: str | Path
) -> None:
    for entry in entries:
        found = checkpoint.dtype_of(entry)
        if found != chosen:
            raise UsageError(
                f"{path}: {entry.path!r} is stored as {found}, and is streamed as it is, but "
                f"{chosen} is wanted; convert it with scripts/convert.py --dtype {chosen}, or "
                f"give --dtype {found}"
            )


def _asked(budgets: Budgets) -> dict[str, int]:
    """Bytes of the tiers that are limited."""
    asked = {
        DEVICE: _bytes("device_memory", budgets.device_memory),
        HOST: _bytes("host_memory", budgets.host_memory),
        NVME: _bytes("nvme_space", budgets.nvme_space),
    }
    return {name: size for name, size in asked.items() if size is not None}


def _folder(budgets: Budgets) -> Path | None:
    return None if budgets.nvme_dir is None else Path(budgets.nvme_dir)


def _bytes(name: str, size: int | str | None) -> int | None:
    if isinstance(size, str):
        return parse_size(size)
    if size is not None and type(size) is not int:
        raise UsageError(f"{name}={size!r} is no size; give whole bytes, or text like '1.5GiB'")
    return size
