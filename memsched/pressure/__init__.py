"""What others leave of main memory, and the budget that follows from it.

`Sensor` reads small files of the kernel; `budget_for` and `following` are pure functions.
"""

from memsched.pressure.decision import State, budget_for, following
from memsched.pressure.observation import Observation
from memsched.pressure.sensor import Sensor

__all__ = ["Observation", "Sensor", "State", "budget_for", "following"]
