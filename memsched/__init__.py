"""Plans the memory of a JAX program ahead of time. It knows JAX and no model.

Nothing of it is built yet: this release contains the model port `qwen3vl_jax` only. What will
come is described in ARCHITECTURE.md: a planner that decides before the first byte is loaded where
every array rests (device, host, NVMe), how it is stored and when it moves, a referee that checks
the plan, and a runtime that carries it out.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
