from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

import pytest
import torch

from seal_fast.results.environment import environment, openmp_libraries


def test_versions_are_those_in_use():
    found = environment()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["triton"] is None or isinstance(found["triton"], str)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_openmp_libraries_are_mapped_files():
    libraries = openmp_libraries()
    if torch.backends.openmp.is_available():
        assert libraries
    for library in libraries:
        assert Path(library).is_file()
        assert hasattr(ctypes.CDLL(library), "omp_get_max_threads")
