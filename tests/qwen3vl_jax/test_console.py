"""What scripts say of their own process."""

import subprocess
import sys

import numpy as np

CHILD = "from qwen3vl_jax import console; print(console.peak_process_bytes())"


def test_the_peak_of_a_process_is_its_own_and_not_that_of_the_one_that_started_it() -> None:
    large = np.ones(400_000_000, np.uint8)
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert large[-1] == 1
    assert 5_000_000 < int(done.stdout) < 200_000_000
