"""transformers' `generate` at one work: for each line on standard input, one rollout batch, all of it at once.

Answers with a line of JSON.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from workloads import WORKS, peak_mib


def main() -> None:
    torch.set_num_threads(2)
    work = dataclasses.replace(WORKS["reasoning"], **json.loads(sys.argv[1]))
    directory = Path(sys.argv[2])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, work.dtype)).eval()
    prompts = json.loads((directory / "prompts.json").read_text())
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    end = tokenizer.eos_token_id
    for _ in sys.stdin:
        started = time.perf_counter()
        output = model.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            max_new_tokens=work.max_tokens,
            num_return_sequences=work.group_size,
            pad_token_id=0,
        )
        seconds = time.perf_counter() - started
        rows = output[:, inputs.input_ids.shape[1] :].tolist()
        tokens = sum(row.index(end) + 1 if end in row else len(row) for row in rows)
        print(json.dumps({"seconds": seconds, "generation": seconds, "tokens": tokens, "peak_mib": peak_mib()}), flush=True)


if __name__ == "__main__":
    main()
