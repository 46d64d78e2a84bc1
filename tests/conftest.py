"""One thread per process: small matrices gain nothing from more, and idle ones must not spin beside other work."""

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: children would ignore Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)
