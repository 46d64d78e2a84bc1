"""One thread per process: small matrices gain nothing from more, and idle ones must not spin beside other work."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import torch

torch.set_num_threads(1)
