"""A process that merges a share of the modules: ``python -m symgeo.merge.worker``.

:mod:`symgeo.merge.processes` starts it; :mod:`symgeo.merge.messages` is what they say to each other.  Its standard
input stays open for as long as the parent lives, so that it knows when it has been left alone.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence

import torch

from symgeo.errors import is_out_of_memory
from symgeo.merge.messages import READY, Failure, Finished, Message, Rows, Share
from symgeo.merge.peft.plan import ModulePlan
from symgeo.merge.peft.tensors import TensorFile
from symgeo.merge.streaming import merge_into, named
from symgeo.parallel import one_thread


def main() -> None:
    """Reads a share from standard input and answers on standard output."""
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)  # what libraries print may not get between the messages
        answer.write(READY)
        answer.flush()
        share = pickle.load(sys.stdin.buffer)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        for message in work(share):
            pickle.dump(message, answer)
            answer.flush()


def work(share: Share) -> Iterator[Message]:
    """Merges the batches of a share, with a message for each; what goes wrong is the last message."""
    batch: Sequence[ModulePlan] = ()
    keys = [key for part in share.batches for module in part for key in module.pair.keys]
    try:
        device = torch.device(share.device)
        with one_thread(), TensorFile(share.file, share.plan.tensors(), keys) as file:
            for batch in share.batches:
                yield Rows(merge_into(file, share.plan, batch, device))
    except Exception as error:
        yield Failure(_message(error, batch), traceback.format_exc())
    else:
        yield Finished()


def _message(error: Exception, batch: Sequence[ModulePlan]) -> str:
    if isinstance(error, ValueError):  # it names what it is about
        return str(error)
    where = f"{named(batch)}: " if batch else ""
    if is_out_of_memory(error):
        return f"{where}out of memory in a worker process; take fewer processes (--processes), or another device"
    return f"{where}{type(error).__name__}: {error} (in a worker process)"


def _end_with_parent() -> None:
    os.read(0, 1)  # nothing comes any more: this returns when the parent has closed the stream, or is gone
    os._exit(1)


if __name__ == "__main__":
    main()
