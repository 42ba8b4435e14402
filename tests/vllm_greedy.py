"""vLLM for CPU, in its own environment: greedy continuations of prompts by exported models.

    .bench/vllm/bin/python tests/vllm_greedy.py JOBS

JOBS: a JSON file with a list of {"model": directory, "prompts": lists of token ids, "tokens": how many}. Prints REPORT and a list
of lists of token ids for each.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")

from vllm import LLM, SamplingParams


def main() -> None:
    answers = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        engine = LLM(job["model"], dtype="float32", enforce_eager=True, max_model_len=192, seed=0, disable_log_stats=True)
        sampling = SamplingParams(temperature=0.0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        results = engine.generate(prompts, sampling, use_tqdm=False)
        answers.append([list(result.outputs[0].token_ids) for result in results])
        del engine
    print("REPORT " + json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
