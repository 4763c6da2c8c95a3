#!/bin/bash
# Stands in for Python where a test is about the job scripts alone: says how it was called, and does what PRISM_NEMO_TEST says.
shift 2 # -m prism_nemo
echo "$*: rank $RANK of $WORLD_SIZE, local $LOCAL_RANK, on $SLURMD_NODENAME, start ${SLURM_RESTART_COUNT:-0}, GPUs $CUDA_VISIBLE_DEVICES"
eval "$PRISM_NEMO_TEST"
