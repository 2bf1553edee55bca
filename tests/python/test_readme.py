"""The C++ examples in README and docs are those that the tests compile and run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "page, example",
    [
        ("README.md", "readme_example.cpp"),
        ("docs/adapter.md", "adapter_example.cpp"),
        ("docs/classifier.md", "classifier_example.cpp"),
        ("docs/add-a-method.md", "example_method.h"),
        ("docs/gpu.md", "gpu/gpu_example.cpp"),
        ("docs/gpu.md", "gpu/gpu_index_example.cpp"),
    ],
)
def test_the_example_is_the_tested_one(page, example):
    blocks = re.findall(r"```cpp\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert (ROOT / "tests" / example).read_text() in blocks
