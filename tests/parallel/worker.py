"""One rank of a test, over the backend that is its argument: reads runs from standard input, one JSON object a line, trains each,
and answers with a line of JSON; where they are traced, with what FSDP2 does, in order."""

import atexit
import gc
import json
import sys

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from lownibble.config import RunConfig
from lownibble.errors import LownibbleError
from lownibble.training import run


def traced(options):
    """`answer`, and the names of torch's records of what FSDP2 does."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        found = answer(options)
    events = profiler.profiler.kineto_results.events()
    records = [(each.start_ns(), each.name()) for each in events if each.name().startswith("FSDP::")]
    return {**found, "records": [name for _, name in sorted(records)]}


def answer(options):
    try:
        result = run(RunConfig.model_validate(options))
    except LownibbleError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    record = result.record
    return {
        "losses": result.losses, "norms": [step["grad_norm"] for step in record["steps"]],
        "tokens": [step["tokens"] for step in record["steps"]], "labels": [step["label_tokens"] for step in record["steps"]],
        "evaluations": [each["loss"] for each in record["evaluations"]], "correct": record["evaluations"][-1]["correct"],
        "parallel": record.get("parallel"), "warnings": record["warnings"], "kinds": {
            key: value for key, value in record["memory"].items() if isinstance(value, int)
        },
    }  # fmt: skip


torch.set_num_threads(1)
atexit.register(gc.unfreeze)  # else triton 3.9 tells at the end that its objects are left
dist.init_process_group(sys.argv[1])
for line in sys.stdin:
    options = json.loads(line)
    print(json.dumps((traced if options.pop("traced", False) else answer)(options)), flush=True)
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()  # what a run imported is not looked through by each of the next ones
dist.destroy_process_group()
