"""transformers as a process that answers questions: one JSON object in, one out, as bench.systems asks them.

    python -m bench.transformers_peer generate|batching FOLDER DTYPE THREADS

In: {"prompts": [[token, ...], ...], "count": tokens to generate for each}. Out: {"replies": [{"tokens": [...], "times":
[seconds after the question, one per token]}, ...]}. `generate` pads several prompts to one batch, and then tells only
when all of it was done.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

PAGE = 256  # tokens; transformers' default
POOL_TOKENS = 64 * PAGE


class Clock(BaseStreamer):
    """Notes when each token came; the first thing a streamer is given is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Generate:
    def __init__(self, model: Any):
        self.model = model

    @torch.inference_mode()
    def ask(self, prompts: list[list[int]], count: int) -> list[dict[str, Any]]:
        began = time.perf_counter()
        width = max(map(len, prompts))
        tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        clock = Clock() if len(prompts) == 1 else None
        out = self.model.generate(
            tokens,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            pad_token_id=0,
            streamer=clock,
        )
        ended = time.perf_counter() - began
        times = [at - began for at in clock.times[1:]] if clock else [ended] * count
        return [{"tokens": row[width:].tolist(), "times": times} for row in out]


class Batching:
    def __init__(self, model: Any):
        settings = GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1, pad_token_id=0)
        pool = ContinuousBatchingConfig(page_size=PAGE, num_blocks=POOL_TOKENS // PAGE, max_batch_tokens=1024)
        self.running = model.init_continuous_batching(settings, pool)
        self.running.start()

    def ask(self, prompts: list[list[int]], count: int) -> list[dict[str, Any]]:
        began = time.perf_counter()
        names = [
            self.running.add_request(prompt, max_new_tokens=count, record_timestamps=True, eos_token_id=-1)
            for prompt in prompts
        ]
        found: dict[str, dict[str, Any]] = {}
        while len(found) < len(names):
            result = self.running.get_result(timeout=1.0)
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                times = [at - began for at in result.timestamps or ()]
                found[result.request_id] = {"tokens": list(result.generated_tokens), "times": times}
            elif not self.running.is_running():
                raise RuntimeError("continuous batching ended")
        return [found[name] for name in names]


def main() -> None:
    mode, folder, dtype, threads = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    system = (Generate if mode == "generate" else Batching)(model)
    print(json.dumps({"ready": mode}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps({"replies": system.ask(**json.loads(line))}), file=out, flush=True)
    os._exit(0)  # its threads do not all end by themselves


if __name__ == "__main__":
    main()
