"""One rank loads a model both ways and writes it again: memory and seconds of each part.

torchrun --nproc_per_node 4 -m benchmarks.loading.worker MODEL-FOLDER OUT.json BYTES-PER-FILE
"""

import ctypes
import gc
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from dpo_dist.attention.interface import register
from dpo_dist.checkpoint import export_model
from dpo_dist.cli.ending import end_rank
from dpo_dist.config import load_deepspeed
from dpo_dist.distributed import all_gather_json, barrier, process_group
from dpo_dist.engine import (
    InferenceEngine,
    adopt_process_group,
    engine_config,
    inference_config,
    release_process_group,
)
from dpo_dist.model import ScoringModel, load_model, scoring
from dpo_dist.pretrained import load_config

SAMPLED_EVERY = 0.005  # seconds


def own_bytes() -> int:
    """What this process holds in memory that no file backs: the kernel cannot take it away."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return sum(1024 * int(words[1]) for words in lines if words[0] in ("RssAnon:", "RssShmem:"))


def shard_of(parameter: Any) -> torch.Tensor:
    """What this rank keeps of a parameter under ZeRO stage 3."""
    return parameter.ds_tensor


class Watch:
    """Peak memory and duration of the parts of a process, which all ranks begin and end together."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Memory is counted from what was held at its beginning."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, so that the next part has to ask for its own
        barrier()
        before, begun, ended, samples = own_bytes(), time.perf_counter(), threading.Event(), [0]

        def sample() -> None:
            while not ended.wait(SAMPLED_EVERY):
                samples.append(own_bytes() - before)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        barrier()
        self.parts[name] = {"seconds": time.perf_counter() - begun, "peak_bytes": max(samples)}


def measure(folder: Path, out: Path, bytes_per_file: int) -> None:
    """Everything, on this rank; the first writes what all of them saw."""
    watch = Watch()
    with process_group(release=release_process_group) as ranks:
        adopt_process_group()
        file = load_deepspeed("zero3_cpu")
        config = inference_config(engine_config(file, torch.bfloat16, ranks.device, max_grad_norm=1.0))

        def load() -> ScoringModel:
            model_config, name = load_config(folder, False), register("sdpa")
            return load_model(folder, model_config, name, torch.bfloat16, config, False, trust_remote_code=False)

        with mock.patch.object(scoring, "can_read_slices", lambda *arguments: False), watch.part("transformers"):
            load()
        with watch.part("load"):
            model = load()
        watch.parts["load"]["shard_bytes"] = sum(2 * shard_of(parameter).numel() for parameter in model.parameters())
        engine = InferenceEngine(model, config)
        with watch.part("export"):
            export_model(
                out.parent / "model",
                engine.named_full_parameters(),
                ranks,
                model.export_config(),
                max_shard_bytes=bytes_per_file,
            )
        everyone = all_gather_json(watch.parts)
        if ranks.is_first:
            out.write_text(json.dumps(everyone, indent=1))


if __name__ == "__main__":
    measure(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    end_rank(0)
