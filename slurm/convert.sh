#!/bin/bash
#SBATCH --job-name=prism-convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# No GPUs: files are read, cut anew and written. PRISM_NEMO_RANKS=8 shares them among processes.
source "${PRISM_NEMO_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/common.sh" ||
    { echo 'no checkout of prism-nemo here: submit from it, or export PRISM_NEMO_HOME=/path/of/it' >&2 && exit 2; }
prism_job convert "$@"
