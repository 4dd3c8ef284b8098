"""Conditional xz sees the training text, however far back."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from ray_ds.evaluate.compression import conditional_bits_per_byte, xz_bytes


def test_repeated_text_costs_almost_nothing_and_noise_eight_bits() -> None:
    rng = random.Random(0)
    train, noise = rng.randbytes(300_000), rng.randbytes(50_000)
    window = 400_000
    base = xz_bytes(train, window)
    repeated = train[:50_000]
    assert conditional_bits_per_byte(base, xz_bytes(train + repeated, window), 50_000) < 0.2
    assert conditional_bits_per_byte(base, xz_bytes(train + noise, window), 50_000) == pytest.approx(8, abs=0.05)
    assert xz_bytes(train + repeated, 1 << 16) > base + 49_000  # out of a small window


def test_length_is_that_of_the_program_xz(tmp_path: Path) -> None:
    text = Path(__file__).read_bytes() * 20
    program = shutil.which("xz")
    assert program is not None
    command = [program, "--lzma2=preset=9e,dict=1MiB", "--check=none", "--threads=1", "--stdout"]
    independent = subprocess.run(command, input=text, capture_output=True, check=True).stdout
    assert abs(xz_bytes(text, 1 << 20) - len(independent)) <= 8


def test_empty_text() -> None:
    assert xz_bytes(b"", 0) < 64
