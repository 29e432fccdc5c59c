#!/bin/bash
# 1. Install the package into an environment on the shared file system, and fill in the lines marked CHANGE.
# 2. `sbatch cluster/slurm.sh config.yaml` runs all stages; words after the config are overrides (--attribution.microbatch 128).
# 3. Killed or out of time, the same command goes on where it stopped; STAGE=extract sbatch ... runs one stage.

#SBATCH --job-name=codec-dist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --time=12:00:00
#SBATCH --output=codec-dist-%j.log
# CHANGE: nodes, CPUs and GPUs per node, time; partition and account where the site asks for them

set -euo pipefail

config=${1:?usage: sbatch cluster/slurm.sh CONFIG [--section.key value ...]}
shift
source "${CODEC_ENV:-$HOME/codec_dist/.venv}/bin/activate" # CHANGE

# Nodes may take minutes to come up; Ray's own patience is half a minute.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
export RAY_USAGE_STATS_ENABLED=0
# A token for this job alone: it travels in the environment, and ends with the job.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head_node" hostname --ip-address | awk '{print $1}')
# Each job its own port, out of the way of the ports that Ray picks for workers.
address=$head_ip:$((6400 + SLURM_JOB_ID % 3000))

# One task per node: every one starts Ray, the first one also runs the command, and all end with it.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    ray symmetric-run \
    --address "$address" \
    --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="${SLURM_CPUS_PER_TASK:-1}" \
    --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
    -- \
    python -m codec_dist "${STAGE:-run}" "$config" "$@" --cluster.address "$address"
