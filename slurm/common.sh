# shellcheck shell=bash
# What every job here has in common. Sourced by the job scripts on the job's first node; not run by itself. docs/slurm.md
#
# Nodes, GPUs, time and the rest are sbatch's: the #SBATCH lines of a script are the defaults, sbatch's own variables
# (SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT, ...) go before them, and flags before both:
#
#   sbatch --nodes=4 --account=vision slurm/align.sh model.path=... data.train=... experiment.dir=runs/align
#
# All behind the script's name goes to the command as it stands; in a job array, `%a` in it becomes the element's index.
#
# From the environment of sbatch (it hands all of it on):
#   PRISM_NEMO_HOME             the checkout; otherwise where the script was submitted from
#   PRISM_NEMO_PYTHON           the Python that has prism-nemo; otherwise .venv/bin/python of the checkout, or python3
#   PRISM_NEMO_SERVE_PYTHON     the Python of rollout servers, where another one has vLLM; otherwise the same
#   PRISM_NEMO_RANKS            processes a node; otherwise one a GPU, or one
#   PRISM_NEMO_CONTAINER        image to run in: for pyxis (a name or .sqsh file), or an apptainer .sif file
#   PRISM_NEMO_MOUNTS           more folders that the container sees, separated by commas, beside checkout, logs and current folder
#   PRISM_NEMO_MAX_FAILURES     ends without progress after which a job is not started again (3)
#   PRISM_NEMO_LOGS             folder for the logs of every rank (logs), in a folder of the job's
#   PRISM_NEMO_NET              network interface between the nodes, where NCCL and gloo choose a wrong one (ib0, eth0)
#   PRISM_NEMO_SRUN             more options for srun, separated by blanks (--mpi=none, --cpu-bind=none)
#   PRISM_NEMO_DOCTOR           not empty: `prism-nemo doctor` looks at all nodes first, and the job fails where one is not healthy
#   PRISM_NEMO_ROLLOUT_NODES    so many of the job's nodes, the last ones, run rollout servers and do not train (0)
#   PRISM_NEMO_ROLLOUT_SERVERS  servers on each of them, which share its GPUs evenly; otherwise one a GPU, or one

set -uo pipefail

readonly EXIT_SAVED=75   # the run was told to stop, and has saved
readonly EXIT_USER=2     # a mistake in what was asked for: to try again would not help
readonly FIRST_PORT=12000 PORTS=20000  # below those that the system gives to outgoing connections
readonly RESEND_SECONDS=10

stopped=  # set once the job was told to stop
woken=    # set when a signal has ended a `wait`
srun=     # process id of the run's
resending=
# SIGUSR1 comes before the time is up, SIGTERM before a preemption or scancel. Caught from here on: bash would end at once.
trap 'stop SIGUSR1' USR1
trap 'stop SIGTERM' TERM

say() { printf '%s %s\n' "$(date '+%F %T')" "$*" >&2; }

die() {
    say "$@"
    exit "$EXIT_USER"
}

# prism_job COMMAND [KEY=VALUE ...]: the job, from the first line of its log to its end.
prism_job() {
    prepare "$1"
    local -a arguments=("$@")
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || arguments=("${@//%a/$SLURM_ARRAY_TASK_ID}")
    directory=$(run_directory "${arguments[@]}")
    say "job $(job_name)${SLURM_RESTART_COUNT:+, restart $SLURM_RESTART_COUNT}: prism-nemo$(printf ' %q' "${arguments[@]}")" \
        "on $SLURM_JOB_NUM_NODES node(s) $SLURM_JOB_NODELIST, $(ranks_per_node) rank(s) each," \
        "commit ${PRISM_NEMO_COMMIT:-unknown}, container ${PRISM_NEMO_CONTAINER:-none}, logs $logs${directory:+, configuration $directory/config.yaml}"
    network
    [[ -f $logs/failures ]] || echo "0 $(what_is_saved)" >"$logs/failures"
    if [[ -n ${PRISM_NEMO_DOCTOR:-} ]]; then examine "${arguments[@]}"; fi
    if ((${PRISM_NEMO_ROLLOUT_NODES:-0} > 0)); then
        choose_servers
        arguments+=(rollout.placement=separate "rollout.servers.urls=[$urls]")
    fi
    run_ranks "${arguments[@]}"
    settle "$(status_of_run $?)"
}

# Where things are. $1: the command, for what is said when a folder is missing.
prepare() {
    [[ -n ${SLURM_JOB_ID:-} || $1 == pipeline ]] || die "not inside of a SLURM job: sbatch slurm/$1.sh ..."
    number PRISM_NEMO_RANKS 1
    number PRISM_NEMO_ROLLOUT_SERVERS 1
    number PRISM_NEMO_MAX_FAILURES 1
    number PRISM_NEMO_ROLLOUT_NODES 0
    home=$(realpath --no-symlinks "${PRISM_NEMO_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}")
    [[ -d $home/prism_nemo ]] || die "$home is no checkout of prism-nemo: submit from one, or set PRISM_NEMO_HOME"
    export PRISM_NEMO_HOME=$home
    # The code that runs is this checkout's, whatever is installed, and the commit in the log is true.
    export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}
    logs=${PRISM_NEMO_LOGS:-logs}/$(job_name)
    mkdir -p "$logs" || exit
    logs=$(realpath "$logs")
    export PRISM_NEMO_FIRST_END=$logs/first_end.${SLURM_RESTART_COUNT:-0}
    # The run notes where it writes, which a configuration file may say, and takes the commit where it finds no git: in a container.
    export PRISM_NEMO_DIRECTORY_FILE=$logs/directory
    PRISM_NEMO_COMMIT=$(commit)
    export PRISM_NEMO_COMMIT
}

# Ends the job unless the variable called $1 is unset or a number of at least $2.
number() {
    local value=${!1:-$2}
    if [[ ! $value =~ ^(0|[1-9][0-9]{0,4})$ ]] || ((value < $2)); then die "$1=$value: it is to be a number of at least $2"; fi
}

# The name by which scontrol knows this job. An array's last element has the whole array's number: the number alone is not enough.
job_name() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; else echo "${SLURM_JOB_ID:-login.$$}"; fi
}

commit() {
    local name
    name=$(git -C "$home" rev-parse HEAD 2>/dev/null) || { echo "${PRISM_NEMO_COMMIT:-}"; return; }
    git -C "$home" diff --quiet HEAD 2>/dev/null || name+='-dirty'
    echo "$name"
}

# The last experiment.dir among the arguments; where a configuration file says it, the run will have noted it: see what_is_saved.
run_directory() {
    local argument found=
    for argument; do [[ $argument == experiment.dir=* ]] && found=${argument#experiment.dir=}; done
    echo "$found"
}

# What was asked for (`8`, `h100:8`) goes before what the node has: an exclusive job's steps see the former.
gpus_per_node() {
    local asked=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    echo "${asked##*:}"
}

servers_per_node() { echo "${PRISM_NEMO_ROLLOUT_SERVERS:-$(gpus_per_node)}"; }

ranks_per_node() { echo "${PRISM_NEMO_RANKS:-$(gpus_per_node)}"; }

# How the ranks find one another, and by which network.
network() {
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # Another one at every restart, should the last be in use still.
    MASTER_PORT=$((FIRST_PORT + (SLURM_JOB_ID * 37 + ${SLURM_RESTART_COUNT:-0}) % PORTS))
    export MASTER_ADDR MASTER_PORT
    # Both look for the interface by themselves, and take a wrong one where a node has several that are up (docker0, a management net).
    if [[ -n ${PRISM_NEMO_NET:-} ]]; then export NCCL_SOCKET_IFNAME=$PRISM_NEMO_NET GLOO_SOCKET_IFNAME=$PRISM_NEMO_NET; fi
    # One queue of kernels a GPU: tensor and context parallelism overlap communication with computation only so.
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export PYTHONUNBUFFERED=1
}

# srun's options for $1 nodes from the job's node number $2 on, with $3 tasks each, in `options`. $4: what the tasks' logs are called;
# without it they write where this script does.
step_options() {
    options=(--nodes="$1" --relative="$2" --ntasks="$(($1 * $3))" --ntasks-per-node="$3"
        --distribution=block  # ranks that follow one another are on one node, whatever the cluster's default: layouts rely on that
        # srun does not inherit it, and would bind a task to a single core; the tasks of a node share what the job has of it.
        --cpus-per-task="$((${SLURM_CPUS_ON_NODE:-$3} > $3 ? ${SLURM_CPUS_ON_NODE:-$3} / $3 : 1))"
        --kill-on-bad-exit=1 --wait=0 --unbuffered --export=ALL)
    if [[ -n ${4:-} ]]; then options+=(--open-mode=append --output="$logs/$4_%t.log" --error="$logs/$4_%t.log"); fi
    if [[ -n ${PRISM_NEMO_CONTAINER:-} && $PRISM_NEMO_CONTAINER != *.sif ]]; then  # pyxis; apptainer is started by rank.sh
        options+=(--container-image="$PRISM_NEMO_CONTAINER" --container-workdir="$PWD" --container-mounts="$(mounts)")
    fi
    local -a more
    read -ra more <<<"${PRISM_NEMO_SRUN:-}"
    options+=("${more[@]}")
}

# Folders that the container sees, each at its own path.
mounts() {
    local folder list=
    local -A seen=()
    for folder in "$home" "$PWD" "$logs" ${PRISM_NEMO_MOUNTS:+${PRISM_NEMO_MOUNTS//,/ }}; do
        [[ -n ${seen[$folder]:-} ]] && continue
        seen[$folder]=1
        if [[ $folder == *:* ]]; then list+=,$folder; else list+=,$folder:$folder; fi
    done
    echo "${list#,}"
}

# Whether the nodes can do it. Nothing is tried again: a node that is not healthy stays so.
examine() {
    local -a options
    step_options "$SLURM_JOB_NUM_NODES" 0 "$(ranks_per_node)"
    PRISM_NEMO_FIRST_END=$logs/doctor_end setsid srun "${options[@]}" bash "$home/slurm/rank.sh" doctor "$@" && return
    [[ -z $stopped ]] || return
    say 'not healthy, as the doctor says above: not started'
    exit 1
}

# Where the rollout servers on the last nodes will be, before they are up: in `urls`.
choose_servers() {
    local nodes=$PRISM_NEMO_ROLLOUT_NODES node number
    ((nodes < SLURM_JOB_NUM_NODES)) || die "PRISM_NEMO_ROLLOUT_NODES=$nodes of $SLURM_JOB_NUM_NODES node(s) leaves none that trains"
    urls=
    while read -r node; do
        for ((number = 0; number < $(servers_per_node); number++)); do urls+=,http://$node:$((MASTER_PORT + 1 + number)); done
    done < <(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n "$nodes")
    urls=${urls#,}
    # A secret of this start: who does not know it is not answered. It is never written down.
    PRISM_NEMO_ROLLOUT_TOKEN=${PRISM_NEMO_ROLLOUT_TOKEN:-$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')}
    export PRISM_NEMO_ROLLOUT_TOKEN
    say "rollout servers: $urls"
}

# As long as the run lives, which ends when they do: without them it would only wait. Ended by SIGTERM.
run_servers() {
    local -a options
    local nodes=$PRISM_NEMO_ROLLOUT_NODES servers=
    trap '' USR1
    trap '[[ -z $servers ]] || kill -TERM "$servers"; exit' TERM
    step_options "$nodes" "$((SLURM_JOB_NUM_NODES - nodes))" "$(servers_per_node)" server
    PRISM_NEMO_SERVE_PORT=$((MASTER_PORT + 1)) setsid srun "${options[@]}" \
        bash "$home/slurm/rank.sh" serve --of "$@" serve.host=0.0.0.0 &
    servers=$!
    wait "$servers"
    say 'the rollout servers have ended, and with them the run'
    kill -TERM "$srun" 2>/dev/null
}

# One task a rank. A rank that ends badly takes the others along within seconds. Its log is beside the job's.
run_ranks() {
    local -a options
    step_options "$((SLURM_JOB_NUM_NODES - ${PRISM_NEMO_ROLLOUT_NODES:-0}))" 0 "$(ranks_per_node)" rank
    [[ -z $stopped ]] || return "$EXIT_SAVED"  # told so before it began: there is nothing to save
    # In a session of its own: a signal for this script must not end srun, which would kill its tasks.
    touch "$logs/rank_0.log"
    local -i known
    known=$(stat --format=%s "$logs/rank_0.log")  # what earlier starts of this job have written
    setsid srun "${options[@]}" bash "$home/slurm/rank.sh" "$@" &
    srun=$!
    tail --bytes=+$((known + 1)) --follow --pid="$srun" "$logs/rank_0.log" &  # the first rank's log is the job's too
    local tail=$! servers='' ended status
    if [[ -n ${urls:-} ]]; then
        run_servers "$@" &
        servers=$!
    fi
    while true; do
        woken=
        wait "$srun"
        ended=$?
        ((ended < 0)) || status=$ended  # bash has no status for what a signal has ended and was waited for before
        [[ -n $woken ]] || break  # otherwise it was the signal that ended the waiting
    done
    [[ -z $resending ]] || kill "$resending" 2>/dev/null
    [[ -z $servers ]] || kill -TERM "$servers" 2>/dev/null
    wait "$tail"
    return "$status"
}

# Every rank is to save and end. A second signal is SLURM's, which ends the job: its time may be up before all was saved.
stop() {
    woken=1
    if [[ -z $stopped ]]; then
        stopped=1
        say "$1: the run saves"
        [[ -z $srun ]] || tell_ranks
    fi
    if [[ $1 == SIGTERM && $(shown) == *' Reason=TimeLimit '* ]]; then start_again 'out of time before the run had saved'; fi
}

# On every node. Once more every few seconds: srun does not pass on what comes before its tasks run.
tell_ranks() {
    kill -USR1 "$srun" 2>/dev/null
    (trap - USR1 TERM; while sleep "$RESEND_SECONDS"; do kill -USR1 "$srun" 2>/dev/null || exit; done) &
    resending=$!
}

# What SLURM knows of this job.
shown() { scontrol show job --oneliner "$(job_name)"; }

# What the first rank that ended badly ended with, and says which: the others were ended for its sake. Without one, what srun did.
status_of_run() {
    local rank status host
    [[ -f $PRISM_NEMO_FIRST_END ]] || { echo "$1"; return; }
    read -r rank status host <"$PRISM_NEMO_FIRST_END"
    ((status == EXIT_SAVED)) || say "rank $rank on $host ended first, with status $status: see $logs/${rank/#[0-9]/rank_&}.log"
    echo "$status"
}

# Ends the job: done, refused, or started again.
settle() {
    case $1 in
        0) say 'finished' ;;
        "$EXIT_USER") say 'refused, for the reason above: it is not tried again' ;;
        "$EXIT_SAVED") start_again 'told to stop' ;;
        *) start_again "${stopped:+told to stop, and then }failed (status $1)" ;;
    esac
    exit "$1"
}

# Queues the job again, unless SLURM has taken that into its hands, or there is no end to it.
start_again() {
    local known state
    known=$(shown)
    state=${known#*JobState=}
    state=${state%% *}
    case $state in
        # Everything else is a kind of running: SIGNALING, for one, for a moment when it is preempted.
        COMPLETING | CANCELLED | PREEMPTED | TIMEOUT | DEADLINE | NODE_FAIL | PENDING | REQUEUE* | SPECIAL_EXIT)
            if [[ $known != *' Reason=TimeLimit '* ]]; then
                say "$1; SLURM has ended the job ($state), and starts it again if that was a preemption or a node that failed"
                return
            fi
            ;;
    esac
    # Whoever is preempted often may yet have no time for a step: that is not counted.
    if [[ $known != *PreemptTime=[0-9]* ]] && ! progressed && (($(failures) >= ${PRISM_NEMO_MAX_FAILURES:-3})); then
        say "$1, as $(failures) times in a row without progress: it is not started again"
        return
    fi
    say "$1: it is queued again"
    scontrol requeue "$(job_name)" || { say 'SLURM refuses to requeue it: submit the same command once more'; return; }
    trap - USR1 TERM
    exec sleep 600  # until SLURM ends it
}

# Whether more was saved than at the last end. Notes how often in a row it was not.
progressed() {
    local saved last count
    saved=$(what_is_saved)
    read -r count last <"$logs/failures"
    if [[ $saved == "$last" ]]; then count=$((count + 1)); else count=1; fi
    echo "$count $saved" >"$logs/failures"
    [[ $saved != "$last" ]]
}

failures() { cut -d ' ' -f 1 "$logs/failures"; }

# A word that changes with every checkpoint, and with every record that was sampled. `unknown` where the run directory is.
what_is_saved() {
    [[ -n $directory ]] || directory=$(cat "$PRISM_NEMO_DIRECTORY_FILE" 2>/dev/null) || { echo unknown; return; }
    { cat "$directory"/{,*/}checkpoints/latest; cat "$directory"/{,*/}parts/rank_*.jsonl | wc -c; } 2>/dev/null | cksum | tr ' ' -
}
