"""Triton's kernels in its interpreter against the definitions, between guard bands of NaN.

The interpreter is chosen where kernels are declared, so it runs in a process of its own, once, and
tells what it found for each case. It rounds bf16 towards zero, which a GPU does not.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    reason = "triton is not installed; pip install triton"
    if os.environ.get("CI"):
        raise RuntimeError(reason)
    pytest.skip(reason, allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))
import interpreted  # noqa: E402


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("interpreted") / "found.json"
    command = [sys.executable, interpreted.__file__, str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("case", interpreted.CASES, ids=interpreted.name_of)
def test_a_kernel_equals_its_definition_and_stays_within_its_tensors(case, found):
    outcome = found[interpreted.name_of(case)]
    tolerance = interpreted.TOLERANCE[case["dtype"]]
    assert max(outcome["errors"]) < tolerance, outcome
    assert outcome["guards"], "written outside of a tensor"


@pytest.mark.parametrize("op", interpreted.OPS)
def test_whatever_the_shape(op, found):
    assert found[f"{op} of any shape"] == "ok"


@pytest.mark.parametrize("size", [2, 4])
def test_a_split_vocabulary_gives_the_whole_ones_loss_and_gradients(size, found):
    assert max(found[f"tp {size}"]) < interpreted.TOLERANCE["float32"]
