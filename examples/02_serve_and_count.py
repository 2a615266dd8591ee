"""Serve the shipped model with the runtime and count what its ranks exchange.

python examples/02_serve_and_count.py                                                  # one rank
torchrun --standalone --nproc-per-node 4 examples/02_serve_and_count.py placement.json  # as placed by example 01
"""

import sys

import torch
from transformers import AutoTokenizer

from moeplace.launch.quickstart.run import shipped
from moeplace.placement.placement_file import load_placement
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.requests import Request

torch.set_num_threads(1)
group = RankGroup.from_environment(timeout=60, device="cpu")
placement = load_placement(sys.argv[1]) if len(sys.argv) > 1 else None
tokenizer = AutoTokenizer.from_pretrained(shipped("tiny-moe"))
engine = Engine(shipped("tiny-moe"), placement, mode="coherent", group=group, dtype=torch.float32)

prompts = ["def main(argv):", "And God said, ", "The following functions"]
requests = [Request(text, tuple(tokenizer(text)["input_ids"]), max_new_tokens=24) for text in prompts]
completions = engine.generate(requests)
counters = engine.counters()
if group.rank == 0:
    for completion in completions:
        print(f"{completion.request_id!r} -> {tokenizer.decode(completion.token_ids)!r}")
    by_mode = counters["collectives_per_layer_by_mode"]
    print(f"collectives per MoE layer: {by_mode}, token copies sent by rank 0: {counters['copies_sent']}")
