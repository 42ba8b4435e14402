#!/usr/bin/env bash
# What only a GPU can show, in less than nine minutes: the tests marked `gpu`, then groupwise beside transformers.
#
#     bash benchmarks/gpu.sh DIRECTORY [--tiny]
#
# Runs on a bare machine: Python with PyTorch 2.11, transformers 5.17 and pytest or later; no network, nothing installed, not even
# groupwise itself. Writes environment.txt, tests.log, bench-*.log, gpu.jsonl, profile-*.txt and RESULTS-gpu.md under DIRECTORY, as
# they come. --tiny: the same in small, on whatever machine this is. PYTHON: which Python; SECONDS_IN_ALL: how long at most.
set -u
out=$(mkdir -p "$1" && cd "$1" && pwd)
tiny=${2:-}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
ends=$((SECONDS + ${SECONDS_IN_ALL:-525}))
export PYTHONPATH=src PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

# limited SECONDS LOG COMMAND...: runs it no longer than that, or than what is left in all; its output goes to LOG and here.
limited() {
    local seconds=$1 log=$2 left=$((ends - SECONDS))
    shift 2
    seconds=$((seconds < left ? seconds : left))
    if ((seconds < 10)); then
        echo "no time is left for: $*" | tee -a "$out/$log"
        return
    fi
    timeout -k 5 "$seconds" "$@" 2>&1 | tee -a "$out/$log"
    local status=${PIPESTATUS[0]}
    ((status == 0)) || echo "exit code $status (124: stopped after $seconds s): $*" | tee -a "$out/$log"
}

limited 20 environment.txt nvidia-smi
limited 60 environment.txt "$python" -c 'import sys, torch, transformers; print(sys.version, torch.__version__, transformers.__version__)'
limited 170 tests.log "$python" -m pytest -p no:cacheprovider -m gpu tests/test_gpu.py tests/test_gpu_memory.py -v -s --tb=short
if [[ $tiny == --tiny ]]; then
    limited 60 bench-tiny.log "$python" benchmarks/gpu.py --tiny --out "$out" --seconds 50
else
    limited 185 bench-0.6B.log "$python" benchmarks/gpu.py --size 0.6B --out "$out" --seconds 165 --profile
    left=$((ends - SECONDS))
    limited "$left" bench-1.7B.log "$python" benchmarks/gpu.py --size 1.7B --out "$out" --seconds $((left - 15))
fi
echo "--- $SECONDS s in all"
grep -E '^(FAILED|ERROR)|passed|failed|skipped' "$out/tests.log" | tail -20
[[ -f $out/RESULTS-gpu.md ]] && cat "$out/RESULTS-gpu.md"
exit 0
