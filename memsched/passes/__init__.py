"""From a program and a machine to a plan, one idea per module."""
