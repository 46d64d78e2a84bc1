"""Each test starts from the same random state, on one thread.

Small matrices gain nothing from more threads, and idle ones must not spin beside other work. Models of libraries draw
their first weights from the global generators: seeded anew before the fixtures and before the body of each test, what
a test sees depends neither on the tests before it nor on the process that runs it.
"""

import os
import random
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import numpy
import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: children would ignore Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def seed() -> None:
    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002 - what libraries draw from
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    seed()
