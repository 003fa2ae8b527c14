"""What torch's linear algebra computes holds on any processor: its tests pass with what MKL has for an older one, too.

MKL chooses its code by the processor, and sums come out otherwise: once a test failed wherever there was AVX-512, and
nowhere else.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from processes import BIN

VARIABLE = "MKL_ENABLE_INSTRUCTIONS"
HERE = Path(__file__).parent
NUMERIC = (
    "test_frozen_factors.py::test_sketch_holds_what_the_best_basis_holds",
    "test_frozen_factors.py::test_one_large_row_does_not_hide_the_others",
    "test_frozen_factors.py::test_a_model_may_change_outputs_in_place",
    "test_frozen_factors.py::test_basis_of_few_rows_is_orthonormal",
    "test_frozen_factors.py::test_basis_is_what_the_data_vary_most_in",
    "test_frozen_factors.py::test_other_bases",
    "test_frozen_factors.py::test_weight_basis_is_the_same_again",
    "test_audit_attacks.py",
    "test_audit_labels.py",
)
"""Of bases and of attacks by least squares."""


def has_avx512() -> bool:
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "avx512f" in cpu.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not has_avx512(), reason="this processor has no AVX-512: all tests are run with AVX2")
@pytest.mark.skipif(VARIABLE in os.environ, reason=f"{VARIABLE} is set: all tests are run with it")
def test_numeric_tests_pass_with_the_code_for_avx2(tmp_path: Path) -> None:
    """As they do without it in this very run."""
    import torch

    if not torch.backends.mkl.is_available():
        pytest.skip("this torch does not compute with MKL")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    command = [BIN / "pytest", "-q", "--basetemp", tmp_path / "run", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(HERE / name for name in NUMERIC)],
        env={**environment, VARIABLE: "AVX2"}, cwd=HERE.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
