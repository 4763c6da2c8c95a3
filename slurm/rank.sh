#!/bin/bash
# One rank: srun starts it on every node, with torch's names for its place. See common.sh.

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
python=(python3)
if [[ ${PRISM_NEMO_CONTAINER:-} == *.sif ]]; then
    python=(apptainer exec --nv --bind "$PRISM_NEMO_HOME${PRISM_NEMO_MOUNTS:+,$PRISM_NEMO_MOUNTS}" --pwd "$PRISM_NEMO_HOME"
        "$PRISM_NEMO_CONTAINER" "${PRISM_NEMO_PYTHON:-python3}")
elif [[ -n ${PRISM_NEMO_PYTHON:-} ]]; then
    python=("$PRISM_NEMO_PYTHON")
elif [[ -z ${PRISM_NEMO_CONTAINER:-} && -x $PRISM_NEMO_HOME/.venv/bin/python ]]; then
    python=("$PRISM_NEMO_HOME/.venv/bin/python")
fi

"${python[@]}" -m prism_nemo "$@" &
run=$!
trap 'kill -USR1 "$run"' USR1
trap 'kill -TERM "$run"' TERM
while true; do
    wait "$run"
    status=$?
    kill -0 "$run" 2>/dev/null || break  # otherwise a signal has ended the waiting, not the run
done
# Whoever fails first is the cause; the others are ended for its sake, and srun reports all of them alike.
if ((status)); then (set -C; echo "$SLURM_PROCID $status $(hostname)" >"$PRISM_NEMO_FIRST_END") 2>/dev/null; fi
exit "$status"
