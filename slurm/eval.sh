#!/bin/bash
#SBATCH --job-name=prism-eval
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
source "${PRISM_NEMO_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/common.sh" ||
    { echo 'no checkout of prism-nemo here: submit from it, or export PRISM_NEMO_HOME=/path/of/it' >&2 && exit 2; }
prism_job eval "$@"
