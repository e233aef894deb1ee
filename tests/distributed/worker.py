"""One process of a group under test: reads the name of a case and its arguments, a line each, and answers with a line.

Run by `conftest.py`, which starts `WORLD_SIZE` of these; imports are paid once for all tests. What is compared is
compared in the cases: optimized and stock under the same engine, and both against one process that has all the data.
"""

from __future__ import annotations

import datetime
import faulthandler
import gc
import json
import os
import signal
import sys
import traceback

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from cases import (
    checkpoints,
    collectives,
    combinations,
    deepspeeds,
    libraries,
    others,
    plans,
    ranks,
    steps,
    torchs,
    zero,
    zero_checkpoints,
    zero_memory,
    zero_orders,
)
from cases.models import DEVICE, ON_GPU

CASES = {
    name: value
    for module in (
        steps,
        collectives,
        combinations,
        ranks,
        others,
        libraries,
        checkpoints,
        plans,
        torchs,
        deepspeeds,
        zero,
        zero_checkpoints,
        zero_memory,
        zero_orders,
    )
    for name, value in vars(module).items()
    if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
}


def main() -> None:
    """Answer each line of stdin until it ends."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1)  # a silent rank is asked where it stands
    seconds = int(os.environ.get("FXOPT_TEST_TIMEOUT", "120"))
    if ON_GPU:
        torch.cuda.set_device(DEVICE)
    backend = "cpu:gloo,cuda:nccl" if ON_GPU else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=seconds))
    met = torch.ones(1, device=DEVICE)
    dist.all_reduce(met)  # ranks that cannot reach each other fail here, and not within a case
    assert met.item() == dist.get_world_size()
    gc.freeze()
    channel.write("ready\n")
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = CASES[name](**arguments)
        except Exception:
            answer = {"error": traceback.format_exc()}
        channel.write(json.dumps(answer) + "\n")
        if ON_GPU:
            torch.cuda.synchronize()  # a device that failed serves no further case: the process ends
        gc.collect()
        gc.freeze()  # what Dynamo keeps of this case need not be walked over in each of the next


if __name__ == "__main__":
    main()
