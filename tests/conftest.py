"""Settings of every test: CPU unless the environment says otherwise, one thread a process."""

import os

# Before torch and DeepSpeed are imported; spawned ranks inherit them.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

# DeepSpeed's ops are found by the ninja of this environment.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

import pytest  # noqa: E402

# They end where there is no GPU; `make gpu-test` asks for them.
collect_ignore = [] if os.environ["DS_ACCELERATOR"] == "cuda" else ["gpu"]


@pytest.fixture(scope="session")
def async_io():
    """Skips a test of NVMe offload where libaio is missing; in CI, which installs it, it fails."""
    from megagpt.operations.prebuild import async_io_problem

    problem = async_io_problem()
    if problem is not None and os.environ.get("CI"):
        pytest.fail(problem)
    if problem is not None:
        pytest.skip(problem)
