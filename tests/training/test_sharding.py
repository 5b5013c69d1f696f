"""FSDP2 over two gloo ranks: packed layers shard as they are, and a step computes what one process does.

Oracle: the same steps in one process. A rank has half of the rows; its loss is divided by the label tokens of both, and
sums are made in another order: rounding apart.
"""

import json
import os
import socket
import subprocess
import sys

import pytest

from lownibble.training.sharding import SHARDS_PACKED

RANK = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import lownibble as ln
from lownibble.quant import QuantLinear
from lownibble.training.loss import label_loss

folder, quant_type, world = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo")
rank = dist.get_rank() if world > 1 else 0
model, _ = ln.load(folder, quant=quant_type, device="cpu")
ln.add_lora(model, ln.LoraConfig(r=4, init_lora_weights=False), seed=1)
whole = sum(p.numel() * p.itemsize for p in model.model.parameters())
if world > 1:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.model)
    held = sum(p.to_local().numel() * p.itemsize for p in model.model.parameters())
    assert held < 0.6 * whole, (held, whole)
    packed = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert packed and all(type(t).__name__ == "DTensor" for m in packed for t in m.parameters())
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2)
generator = torch.Generator().manual_seed(0)
losses = []
for step in range(3):
    ids = torch.randint(3, 96, (4, 12), generator=generator)
    mine = ids[rank * 4 // world : (rank + 1) * 4 // world]
    loss = label_loss(model, mine, torch.ones_like(mine), mine, 4 * 11)
    (loss * world).backward()  # FSDP2 averages over ranks
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    if world > 1:
        dist.all_reduce(total)
    losses.append(float(total))
if rank == 0:
    print(json.dumps(losses))
if world > 1:
    dist.destroy_process_group()
"""


def losses(folder, quant_type, world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), quant_type, str(world)], env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        ended = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "".join(errors for _, errors in ended)
    return json.loads(ended[0][0].splitlines()[-1])


@pytest.mark.skipif(not SHARDS_PACKED, reason="this torch shards floats only")
@pytest.mark.parametrize("quant_type", [pytest.param(name, marks=pytest.mark.slow) for name in ("nf4", "int8", "int4")])
def test_two_ranks_train_as_one_process(write, forked, quant_type):
    folder = write("llama", hidden_size=64, intermediate_size=128)
    one, two = losses(folder, quant_type, 1), losses(folder, quant_type, 2)
    assert len(set(one)) == 3
    assert two == pytest.approx(one, rel=2e-5)
