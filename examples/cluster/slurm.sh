#!/bin/bash
# A run on several nodes of a Slurm cluster: the first node learns, on all of its GPUs; each GPU of the others samples.
#
#     sbatch --nodes=3 --gpus-per-node=8 examples/cluster/slurm.sh RECIPE RUN
#
# RECIPE and RUN are on a file system that all nodes see, and groupwise is installed on all of them. Submitted again with the same
# RUN, or requeued, the run goes on from its last checkpoint. A sampler that ends is started again by the loop below; the run
# waits for it, and the other samplers do its work meanwhile.
#
#SBATCH --job-name=groupwise
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:TERM@300

set -euo pipefail

recipe=$1
run=$2
gpus=${SLURM_GPUS_ON_NODE:-8}
first_port=8100
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
learner=${nodes[0]}
samplers=("${nodes[@]:1}")
if [ ${#samplers[@]} -eq 0 ]; then
    echo "one node learns and the others sample: at least 2 nodes are needed" >&2
    exit 2
fi

addresses=()
for node in "${samplers[@]}"; do
    for ((gpu = 0; gpu < gpus; gpu++)); do
        addresses+=("\"http://$node:$((first_port + gpu))\"")
    done
done
list="[$(IFS=,; echo "${addresses[*]}")]"

# A sampler on a GPU of this node, which is started again whenever it ends. Only this cluster's network may reach its port.
keep_serving() {
    trap 'kill "$server"; exit' TERM
    while true; do
        CUDA_VISIBLE_DEVICES=$1 groupwise serve "$recipe" --host 0.0.0.0 --port $((first_port + $1)) &
        server=$!
        wait "$server" || true
        sleep 2
    done
}

# Samplers on all GPUs of this node.
serve_on_all() {
    for ((gpu = 0; gpu < gpus; gpu++)); do
        keep_serving "$gpu" &
    done
    trap 'kill $(jobs -p)' TERM
    wait
    wait # for what was just told to end
}

export recipe gpus first_port
export -f keep_serving serve_on_all
srun --nodes=${#samplers[@]} --ntasks=${#samplers[@]} --nodelist="$(IFS=,; echo "${samplers[*]}")" --overlap \
    bash -c serve_on_all &
serving=$!
trap 'kill "$serving" 2>/dev/null || true; wait "$serving" || true' EXIT

settings=(--set "rollouts.sampler=$list" --set "cluster.learners=$gpus" --set cluster.timeout=300)
if [ -f "$run/recipe.toml" ]; then
    what=(--resume "$run")
else
    what=("$recipe" --out "$run")
fi
srun --nodes=1 --ntasks=1 --nodelist="$learner" --overlap groupwise train "${what[@]}" "${settings[@]}" &
training=$!
trap 'kill -TERM "$training"' TERM # a checkpoint is written after the step under way; the first wait returns at once
wait "$training" || wait "$training"
