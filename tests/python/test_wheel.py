"""What a user does: `pip install CHECKOUT` in a clean environment, then import, search and attend.

With CUDA too where FAISS_SAAP_TEST_CUDA_WHEEL names a folder to build in: it takes as long as the library's CUDA build.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import numpy as np
import faiss_saap as fs

random = np.random.default_rng(1)
x = random.standard_normal((1000, 32), dtype=np.float32)
index = fs.IndexAsymmetricIVF(32, "AIVF16,Flat", fs.METRIC_INNER_PRODUCT)
index.train(x)
index.add(x)
index.nprobe = 16
assert (index.search(x[:5], 1)[1][:, 0] == np.argmax(x[:5] @ x.T, axis=1)).all()

kv = fs.KvView.token_major(x[:, None], x[:, None])
adapter = fs.AttentionAdapter(2, 1, 32, [fs.kmeans_partition(x, 16)], window=100, policy=fs.ProbePolicy(nprobe=16))
sequence = adapter.create()
adapter.append(sequence, kv)
result = adapter.attend([fs.SequenceInput(sequence, kv)], x[:2])
np.testing.assert_allclose(result.output[0], fs.attend_dense(kv, x[:2])[0], atol=1e-5)
assert fs.has_cuda == hasattr(fs, "GpuAttentionAdapter")
print(fs.has_cuda, fs.__file__)
"""


@pytest.mark.parametrize("cuda", [False, True])
def test_installed_from_the_checkout_in_a_clean_environment(cuda, tmp_path):
    folder = os.environ.get("FAISS_SAAP_TEST_CUDA_WHEEL")
    if cuda and not (folder and shutil.which("nvcc")):
        pytest.skip("FAISS_SAAP_TEST_CUDA_WHEEL names no folder, or there is no nvcc")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    reachable = subprocess.run([*pip, "install", "-q", "numpy"], env=environment, capture_output=True, text=True)
    if reachable.returncode:
        pytest.skip(f"packages cannot be downloaded: {reachable.stderr.strip().splitlines()[-1]}")
    if shutil.which("ccache"):
        environment["CMAKE_CXX_COMPILER_LAUNCHER"] = environment["CMAKE_CUDA_COMPILER_LAUNCHER"] = "ccache"
    options = ["-C", "cmake.define.FAISS_SAAP_CUDA=ON", "-C", f"build-dir={folder}"] if cuda else []
    done = subprocess.run([*pip, "install", ROOT, *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ran = subprocess.run([python, "-c", PROGRAM], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    has_cuda, file = ran.stdout.split()
    package = Path(file).parent
    assert has_cuda == str(cuda)
    assert package.is_relative_to(tmp_path / "venv")
    assert {p.suffix for p in package.iterdir() if p.is_file()} >= {".py", ".so", ".pyi"}
    assert (package / "py.typed").exists() and (package / "huggingface.py").exists()
    # the archive, headers and CMake files of the C++ package stay out of the environment
    assert not list((tmp_path / "venv" / "lib").rglob("libfaiss_saap.a"))
    assert not list((tmp_path / "venv" / "include").rglob("AttentionAdapter.h"))
