"""vLLM for CPU in its own process: for each line on standard input, the completions of some prompts; answers with a line of JSON.

    .bench/vllm/bin/python benchmarks/worker_vllm_prompts.py MODEL

Lines: {"prompts": lists of token ids, "n": completions of each, "max_tokens": of each, "seeds": one for each prompt}.
"""

import json
import os
import sys
import time

os.environ.update(VLLM_CPU_KVCACHE_SPACE="2", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")

from vllm import LLM, SamplingParams


def main() -> None:
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 1024, "seed": 0}
    engine = LLM(
        sys.argv[1],
        logprobs_mode="processed_logprobs",
        enable_chunked_prefill=False,  # the build for CPUs fails where the prompt of a request with a seed is cut
        disable_log_stats=True,
        **settings,
    )
    print("READY", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        shared = {"n": job["n"], "temperature": 1.0, "max_tokens": job["max_tokens"], "logprobs": 0}
        sampling = [SamplingParams(**shared, seed=seed) for seed in job["seeds"]]
        started = time.perf_counter()
        results = engine.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = sum(len(output.token_ids) for result in results for output in result.outputs)
        print("REPORT " + json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
