"""What was learned of machines: beside a machine's TOML, or in a file of the user's own."""

import dataclasses
import hashlib
import os
import platform
from pathlib import Path

from memsched.cost.coefficients_file import cost_beside
from memsched.cost.learned import LearnedCost
from memsched.cost.roofline import CostModel, Roofline
from memsched.errors import MemschedError, ProgramError
from memsched.machine import Machine
from memsched.profiles import load_machine

CPU_INFO = Path("/proc/cpuinfo")


def user_profile() -> Path:
    """Where this machine's own profile lies: `memsched/machine.toml` of the user's settings."""
    settings = os.environ.get("XDG_CONFIG_HOME", "")
    home = Path(settings) if Path(settings).is_absolute() else Path("~/.config")
    # A user without a home has no such file.
    return Path(os.path.expanduser(home / "memsched" / "machine.toml"))


def observation_file(profile: Path) -> Path:
    """Where what was measured lies: beside the profile."""
    return profile.with_suffix(".observations.jsonl")


def hardware_identity(cpu_info: Path = CPU_INFO) -> str:
    """16 hexadecimal digits for the processor and how many of its threads may be used."""
    try:
        lines = cpu_info.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    model = next((line for line in lines if line.startswith("model name")), platform.processor())
    body = f"{platform.machine()} {model} {len(os.sched_getaffinity(0))}"
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def calibrated(machine: Machine, profile: Path | None = None) -> tuple[Machine, CostModel]:
    """A detected machine with the rates and the cost model that its user's calibration found.

    Without one, or with one of other hardware, the machine stays as it is. A calibration that is
    damaged is passed over, too: nobody named it. `damage` says so.
    """
    try:
        known, cost = _known(profile or user_profile())
    except MemschedError:
        return machine, Roofline()
    fitting = (
        known is not None
        and isinstance(cost, LearnedCost)
        and cost.coefficients.identity == hardware_identity()
        and known.platform == machine.platform
        and [tier.name for tier in known.tiers] == [tier.name for tier in machine.tiers]
    )
    if known is None or not fitting:
        return machine, Roofline()
    return dataclasses.replace(machine, compute=known.compute, links=known.links), cost


def damage(profile: Path | None = None) -> MemschedError | None:
    """Why the user's calibration is passed over though there is one; None for one that is whole."""
    try:
        _known(profile or user_profile())
    except MemschedError as error:
        return error
    return None


def check_hardware(cost: CostModel, profile: Path) -> None:
    """Whether what is measured here may be added to what was learned of a profile's machine.

    Raises:
        ProgramError: that was measured on other hardware.
    """
    here = hardware_identity()
    if isinstance(cost, LearnedCost) and cost.coefficients.identity != here:
        raise ProgramError(
            f"{profile} was calibrated on hardware {cost.coefficients.identity}, and this is "
            f"{here}: another processor, or another number of its threads; run "
            "scripts/calibrate.py here, with another --out"
        )


def cost_of(machine: Machine, profile: Path | None) -> CostModel:
    """The cost model of a machine that a file describes, or else of the user's own calibration.

    Raises:
        DamagedError: a cost model lies beside the named profile, and is damaged or of another one.
    """
    if profile is not None:
        return cost_beside(profile, machine)
    return calibrated(machine)[1]


def _known(file: Path) -> tuple[Machine | None, CostModel]:
    """The machine of a file and its cost model, if there is such a file."""
    known = load_machine(file) if file.exists() else None
    return known, cost_beside(file, known) if known else Roofline()
