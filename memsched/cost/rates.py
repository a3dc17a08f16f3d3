"""Which machine measurements belong to: its rates, whatever the budgets are."""

import dataclasses
import hashlib
import json

from memsched.machine import Machine


def rates_digest(machine: Machine) -> str:
    """16 hexadecimal digits that change with the compute and with any link."""
    body = [machine.platform, dataclasses.asdict(machine.compute)]
    body += [dataclasses.asdict(link) for link in machine.links]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
