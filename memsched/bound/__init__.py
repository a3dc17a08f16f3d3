"""What no schedule can beat: a linear program over what can be kept from one pass to the next."""

from memsched.bound.linear import Solution, least_busy_s, solve
from memsched.bound.masses import Masses, read_masses
from memsched.bound.placement import Placed, placed

__all__ = ["Masses", "Placed", "Solution", "least_busy_s", "placed", "read_masses", "solve"]
