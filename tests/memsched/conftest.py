"""Lets the tests here share programs.py, tiny_kernels.py and symbolic.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
