"""One thread per process: small matrices gain nothing from more, and parallel runs lose."""

import torch

torch.set_num_threads(1)
