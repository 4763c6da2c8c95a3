#!/bin/bash
# One process: srun starts it on every node. A rank, with torch's names for its place; or, with PRISM_NEMO_SERVE_PORT, a rollout
# server, which is started again when it dies, as long as the run lives. See common.sh.

# An image may set a PYTHONPATH of its own, which pyxis puts before that of the job.
[[ ${PYTHONPATH:-} == "$PRISM_NEMO_HOME"* ]] || export PYTHONPATH=$PRISM_NEMO_HOME${PYTHONPATH:+:$PYTHONPATH}

python=(python3)
if [[ ${PRISM_NEMO_CONTAINER:-} == *.sif ]]; then
    python=(apptainer exec --nv --bind "$PRISM_NEMO_HOME,$PWD,${PRISM_NEMO_FIRST_END%/*}${PRISM_NEMO_MOUNTS:+,$PRISM_NEMO_MOUNTS}"
        --pwd "$PWD" "$PRISM_NEMO_CONTAINER" "${PRISM_NEMO_PYTHON:-python3}")
elif [[ -n ${PRISM_NEMO_PYTHON:-} ]]; then
    python=("$PRISM_NEMO_PYTHON")
elif [[ -z ${PRISM_NEMO_CONTAINER:-} && -x $PRISM_NEMO_HOME/.venv/bin/python ]]; then
    python=("$PRISM_NEMO_HOME/.venv/bin/python")
fi

# Whoever fails first is the cause: the others are ended for its sake, and srun reports all of them alike.
failed() { (set -C; echo "$1 $2 ${SLURMD_NODENAME:-$(hostname)}" >"$PRISM_NEMO_FIRST_END") 2>/dev/null; }

if [[ -n ${PRISM_NEMO_SERVE_PORT:-} ]]; then
    unset MASTER_ADDR MASTER_PORT
    if [[ ${PRISM_NEMO_CONTAINER:-} == *.sif ]]; then  # the image names it: so it is asked inside
        # shellcheck disable=SC2016
        python=("${python[@]:0:${#python[@]}-1}" sh -c 'exec "${PRISM_NEMO_SERVE_PYTHON:-$0}" "$@"' "${python[-1]}")
    else
        python=("${PRISM_NEMO_SERVE_PYTHON:-${python[0]}}")
    fi
    # GPU number i of n servers that share g: those from i*g/n up to (i+1)*g/n.
    IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
    each=$((${#gpus[@]} / SLURM_NTASKS_PER_NODE))
    if ((each)); then
        mine=("${gpus[@]:$((SLURM_LOCALID * each)):each}")
        CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${mine[*]}")
    fi
    trap '' USR1 TERM  # the server does not hear them either: the run's last step may need it still; its end is the run's
    while true; do
        "${python[@]}" -m prism_nemo "$@" "serve.port=$((PRISM_NEMO_SERVE_PORT + SLURM_LOCALID))"
        status=$?
        if ((status == 2 || status == 126 || status == 127)); then  # refused, or there is no such Python
            failed "server_$SLURM_PROCID" "$status"
            exit "$status"
        fi
        echo "the server ended with status $status: it is started again" >&2
        sleep 1
    done
fi

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
told=
woken=
run=
trap 'told=1 woken=1; [[ -z $run ]] || kill -USR1 "$run" 2>/dev/null' USR1 TERM
"${python[@]}" -m prism_nemo "$@" &
run=$!
[[ -z $told ]] || kill -USR1 "$run" 2>/dev/null
while true; do
    woken=
    wait "$run"
    ended=$?
    ((ended < 0)) || status=$ended  # bash has no status for what a signal has ended and was waited for before
    [[ -n $woken ]] || break  # otherwise it was the signal that ended the waiting
done
# It did not live to take note of the signal (SIGUSR1 or SIGTERM ended it): so there was nothing yet to save.
if [[ -n $told ]] && ((status == 138 || status == 143)); then status=75; fi
((status == 0)) || failed "$SLURM_PROCID" "$status"
exit "$status"
