# shellcheck shell=bash
# What every job here has in common. Sourced by the job scripts on the job's first node; not run by itself.
#
# Nodes, GPUs, time and the rest are sbatch's: the #SBATCH lines of a script are the defaults, sbatch's own variables
# (SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT, ...) go before them, and flags before both:
#
#   sbatch --nodes=4 --account=vision slurm/align.sh model.path=... data.train=... experiment.dir=runs/align
#
# All behind the script's name goes to the command as it stands; `%a` in it becomes the array index.
#
# From the environment of sbatch (it hands all of it on):
#   PRISM_NEMO_HOME           the checkout; otherwise where the script was submitted from
#   PRISM_NEMO_PYTHON         the Python that has prism-nemo; otherwise .venv/bin/python of the checkout, or python3
#   PRISM_NEMO_RANKS          processes a node; otherwise one a GPU, or one
#   PRISM_NEMO_CONTAINER      image to run in: for pyxis (a name or .sqsh file), or an apptainer .sif file
#   PRISM_NEMO_MOUNTS         more folders that the container sees, separated by commas; the checkout is always one
#   PRISM_NEMO_MAX_FAILURES   failures without progress after which a job is not started again (3)
#   PRISM_NEMO_LOGS           folder for the logs of every rank (logs), in a folder of the job's
#   PRISM_NEMO_NET            network interface between the nodes, where NCCL and gloo choose a wrong one (ib0, eth0)

set -uo pipefail

readonly EXIT_SAVED=75   # the run was told to stop, and has saved
readonly EXIT_USER=2     # a mistake in what was asked for: to try again would not help

say() { printf '%s %s\n' "$(date '+%F %T')" "$*" >&2; }

die() {
    say "$@"
    exit "$EXIT_USER"
}

# prism_job COMMAND [KEY=VALUE ...]: the job, from the first line of its log to its end.
prism_job() {
    local command=$1
    shift
    export PRISM_NEMO_HOME=${PRISM_NEMO_HOME:-${SLURM_SUBMIT_DIR:?not inside of a SLURM job: use sbatch}}
    home=$PRISM_NEMO_HOME
    [[ -d $home/prism_nemo ]] || die "$home is no checkout of prism-nemo: submit from there, or set PRISM_NEMO_HOME"
    cd "$home" || exit
    arguments=("$command" "${@//%a/${SLURM_ARRAY_TASK_ID:-0}}")
    directory=$(run_directory "${arguments[@]}")
    logs=${PRISM_NEMO_LOGS:-logs}/$(job_name)
    mkdir -p "$logs" || exit
    say "job $(job_name)${SLURM_RESTART_COUNT:+, restart $SLURM_RESTART_COUNT}: prism-nemo ${arguments[*]}" \
        "on $SLURM_JOB_NUM_NODES node(s) $SLURM_JOB_NODELIST, $(ranks_per_node) rank(s) each, commit $(commit)"
    network
    PRISM_NEMO_FIRST_END=$(realpath "$logs")/first_end.${SLURM_RESTART_COUNT:-0}
    export PRISM_NEMO_FIRST_END
    run_ranks "${arguments[@]}"
    settle "$(status_of_run $?)"
}

# The name by which scontrol knows this job, an array's element too.
job_name() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; else echo "$SLURM_JOB_ID"; fi
}

commit() {
    local name
    name=$(git -C "$home" rev-parse --short HEAD 2>/dev/null) || { echo unknown; return; }
    git -C "$home" diff --quiet HEAD 2>/dev/null || name+=', changed'
    echo "$name"
}

# The last experiment.dir among the arguments; nothing where a configuration file says it.
run_directory() {
    local argument found=
    for argument; do [[ $argument == experiment.dir=* ]] && found=${argument#experiment.dir=}; done
    echo "$found"
}

ranks_per_node() { echo "${PRISM_NEMO_RANKS:-${SLURM_GPUS_ON_NODE:-1}}"; }

# How the ranks find one another, and by which network.
network() {
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # Below the ports that the system gives to outgoing connections; another one at every restart, should the last be in use still.
    MASTER_PORT=$((12000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 20000))
    export MASTER_ADDR MASTER_PORT
    if [[ -n ${PRISM_NEMO_NET:-} ]]; then export NCCL_SOCKET_IFNAME=$PRISM_NEMO_NET GLOO_SOCKET_IFNAME=$PRISM_NEMO_NET; fi
    # A collective that fails must end its process, and with it the job, instead of waiting for the others for ever.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
    # One queue of kernels a GPU: tensor and context parallelism overlap communication with computation only so.
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export PYTHONUNBUFFERED=1
}

# One task a rank. A rank that ends badly takes the others along within seconds. Its log is beside the job's.
run_ranks() {
    local ranks
    local -a container=()
    ranks=$(ranks_per_node)
    if [[ -n ${PRISM_NEMO_CONTAINER:-} && $PRISM_NEMO_CONTAINER != *.sif ]]; then  # pyxis; apptainer is started by rank.sh
        container=("--container-image=$PRISM_NEMO_CONTAINER" "--container-workdir=$home"
            "--container-mounts=$home:$home${PRISM_NEMO_MOUNTS:+,$PRISM_NEMO_MOUNTS}")
    fi
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * ranks))" --ntasks-per-node="$ranks" \
        --kill-on-bad-exit=1 --wait=60 --open-mode=append --unbuffered --export=ALL \
        --output="$logs/rank_%t.log" --error="$logs/rank_%t.log" \
        "${container[@]}" \
        bash "$home/slurm/rank.sh" "$@" &
    local srun=$!
    tail -q -n 0 -F --pid="$srun" "$logs/rank_0.log" 2>/dev/null &  # the first rank's log is the job's too
    # SIGUSR1 comes before the time is up, SIGTERM before a preemption. srun hands SIGUSR1 on to every rank, and would end them
    # at once on SIGTERM; they save and end with EXIT_SAVED.
    trap 'stopped=time; say "SIGUSR1: the run saves"; kill -USR1 "$srun" 2>/dev/null' USR1
    trap 'stopped=order; say "SIGTERM: the run saves"; kill -USR1 "$srun" 2>/dev/null' TERM
    local status
    while true; do
        wait "$srun"
        status=$?
        kill -0 "$srun" 2>/dev/null || break  # otherwise a signal has ended the waiting, not srun
    done
    trap - USR1 TERM
    return "$status"
}

# What the first rank that ended badly ended with, and says which: the others were ended for its sake. Without one, what srun did.
status_of_run() {
    local rank status host
    [[ -f $PRISM_NEMO_FIRST_END ]] || { echo "$1"; return; }
    read -r rank status host <"$PRISM_NEMO_FIRST_END"
    ((status == EXIT_SAVED)) || say "rank $rank on $host ended first, with status $status: see $logs/rank_$rank.log"
    echo "$status"
}

# Ends the job: done, started again, or failed for good.
settle() {
    local status=$1
    case $status in
        0) say 'finished' ;;
        "$EXIT_USER") say 'the run was refused: see above' ;;
        "$EXIT_SAVED")
            if [[ ${stopped:-} == order ]]; then
                say 'saved; SLURM starts it again if it was preempted'
            else
                start_again 'saved before the end of its time'
            fi
            ;;
        *)
            if progressed; then start_again "failed (status $status), and had made progress"
            elif (($(failures) < ${PRISM_NEMO_MAX_FAILURES:-3})); then start_again "failed (status $status), time $(failures)"
            else say "failed (status $status) $(failures) times without progress: it is not started again"; fi
            ;;
    esac
    exit "$status"
}

start_again() {
    say "$1: it is queued again"
    scontrol requeue "$(job_name)" || { say 'SLURM refuses to requeue it'; exit 1; }
    sleep 600  # until SLURM ends this script
}

# Whether a step was saved since the last failure. Notes how many failures there were since, and at which step.
progressed() {
    local step last=none count=0
    step=$(cat "$directory/checkpoints/latest" 2>/dev/null || echo none)
    [[ -f $logs/failures ]] && read -r count last <"$logs/failures"
    if [[ $step != "$last" ]]; then count=0; fi
    echo "$((count + 1)) $step" >"$logs/failures"
    [[ $step != "$last" ]]
}

failures() { cut -d ' ' -f 1 "$logs/failures"; }
