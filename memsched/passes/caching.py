"""Whole plans from demand paging: for irregular programs, and to compare with."""

from memsched.passes.budgets import host_room
from memsched.passes.keep import POLICIES, PolicyMaker
from memsched.passes.lower.assemble import assemble
from memsched.passes.lower.layout import Pool
from memsched.passes.lower.paging import page, paging_moves
from memsched.passes.needs import Needs
from memsched.passes.recipes import stacked
from memsched.passes.search import Found
from memsched.plan import Plan

# Offsets by first fit may need more than the bytes in use: then it is tried with that much less.
SHRINK = 0.96
MOST_TRIES = 16
# First fit takes quadratic time, so offsets of larger programs are not worked out in vain.
MOST_WEIGHTS = 100
CACHES = ("lru", "clock", "adaptive")


def better_cached(needs: Needs, found: Found, *, repeat: bool) -> Plan:
    """The faster of a plan and what caches make of the program; for small ones of all policies."""
    if set(needs.weights) <= set(found.layout.device.pinned):
        return found.plan
    best, best_s = found.plan, needs.seconds(found.plan)
    if needs.judge is None and best_s <= sum(needs.step_s) * (1 + 1e-9):
        return best
    names = tuple(POLICIES) if len(needs.weights) <= MOST_WEIGHTS else CACHES
    for name in names:
        if least_seconds(needs, found, POLICIES[name], repeat=repeat) >= best_s:
            continue
        better = _faster(needs, found, POLICIES[name], best_s, repeat=repeat)
        best, best_s = better or (best, best_s)
    return best


def _faster(
    needs: Needs, found: Found, maker: PolicyMaker, than_s: float, *, repeat: bool
) -> tuple[Plan, float] | None:
    """The plan of a cache and its seconds, if it takes less; offsets of many weights only then."""
    made: tuple[Plan, float] | None = None
    for packed in (False, True) if len(needs.weights) > MOST_WEIGHTS else (True,):
        plan = caching_plan(needs, found, maker, repeat=repeat, packed=packed)
        if plan is None or (seconds := needs.seconds(plan)) >= than_s:
            return None
        made = plan, seconds
    return made


def least_seconds(needs: Needs, found: Found, maker: PolicyMaker, *, repeat: bool) -> float:
    """What a cache copies over the busiest link, with all the room that there is.

    0 where offsets may take so much room that the cache gets less: then it copies other weights.
    """
    if needs.machine.device_is_host and len(needs.weights) <= MOST_WEIGHTS:
        return 0.0
    room = needs.device_capacity_bytes - found.values.device_bytes
    paged = page(needs, room, maker, repeat=repeat)
    if paged is None:
        return float("inf")
    host = _host_pool(needs, host_room(needs, found.values), repeat=repeat)
    resting = {} if host is None else host.pinned
    coming = [name for names in paged.come for name in names]
    staged = [name for name in coming if host is not None and name not in resting]
    return max(
        sum((needs.arrival_s[name] for name in coming), 0.0),
        sum((needs.staging_s[name] for name in staged), 0.0),
    )


def caching_plan(
    needs: Needs, found: Found, maker: PolicyMaker, *, repeat: bool, packed: bool = True
) -> Plan | None:
    """The plan that a cache with some policy amounts to, or None if it finds no room.

    Args:
        needs: the program and its machine.
        found: another plan, from which the actions of everything but weights are taken.
        maker: the policy.
        repeat: whether the plan follows itself.
        packed: whether weights get offsets; without them the plan is good for its seconds only.
    """
    room = needs.device_capacity_bytes - found.values.device_bytes
    host = _host_pool(needs, host_room(needs, found.values), repeat=repeat)
    budget = room
    for _ in range(MOST_TRIES):
        paged = page(needs, budget, maker, repeat=repeat)
        if paged is None:
            return None
        moves = paging_moves(needs, paged, room, host, packed=packed)
        if moves is not None:
            return assemble(needs, moves, found.values)
        budget = int(SHRINK * budget)
    return None


def _host_pool(needs: Needs, room: int, *, repeat: bool) -> Pool | None:
    """What is read first rests in the host; room for one weight more is kept for the others."""
    if needs.machine.device_is_host:
        return None
    largest = max((needs.host_bytes[name] for name in needs.weights), default=0)
    resting, used = [], 0
    for name in needs.weights if repeat else ():
        if used + needs.host_bytes[name] <= room - largest:
            resting.append(name)
            used += needs.host_bytes[name]
    return stacked(resting, needs.host_bytes, room)
