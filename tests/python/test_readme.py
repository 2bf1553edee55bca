"""The README's C++ example is the one that the tests compile and run."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_is_the_tested_one():
    blocks = re.findall(r"```cpp\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert (ROOT / "tests/readme_example.cpp").read_text() in blocks
