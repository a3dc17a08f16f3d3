"""Compiling steps for an accelerator that is not at hand, to know what they take there."""

from memsched.aot.compiler import Compiler, Workspace, absent_device, with_workspaces

__all__ = ["Compiler", "Workspace", "absent_device", "with_workspaces"]
