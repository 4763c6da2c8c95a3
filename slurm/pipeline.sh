#!/bin/bash
#SBATCH --job-name=prism-pipeline
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --mem=32G
#SBATCH --signal=B:USR1@300
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# A pipeline as a chain of jobs: this one makes the run directory and submits a job for each stage that has not finished, to start
# when those have finished whose output it needs, and a last one that exports the policy and writes the summary.
#
#   sbatch slurm/pipeline.sh --config my_pipeline.yaml experiment.dir=runs/mine         or, on a login node, bash slurm/pipeline.sh ...
#
# Where a stage fails, the jobs that need its output are cancelled. The same command again goes on with what has not finished.
#
#   PRISM_NEMO_SBATCH          options of sbatch for every stage's job, separated by blanks
#   PRISM_NEMO_SBATCH_<STAGE>  more, for the stage of that name alone, `-` in it as `_` (PRISM_NEMO_SBATCH_align='--nodes=4')
#   PRISM_NEMO_SBATCH_END      and for the last job
#
# Account, partition and QOS of this job are those of the others too, where these do not say otherwise.
source "${PRISM_NEMO_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/common.sh" ||
    { echo 'no checkout of prism-nemo here: submit from it, or export PRISM_NEMO_HOME=/path/of/it' >&2 && exit 2; }

declare -A jobs=()  # of stages, by name

submit_all() {
    prepare pipeline
    say "$(job_name): prism-nemo pipeline$(printf ' %q' "$@"), commit ${PRISM_NEMO_COMMIT:-unknown}," \
        "container ${PRISM_NEMO_CONTAINER:-none}"
    local plan=$logs/stages.sh
    once pipeline "$@" --jobs "$plan" || exit
    # shellcheck source=/dev/null
    source "$plan"  # defines `directory`, and `stages`, which calls `submit` for every stage that has not finished
    journal=$directory/slurm_jobs
    refuse_twice
    : >"$journal"
    stages
    local -a all=("${jobs[@]}")
    PRISM_NEMO_PIPELINE_END=1 submit END pipeline "${!jobs[*]}" "$@"
    say "${#all[@]} stage(s) to do, and the end. See squeue --me. To stop them all: scancel ${all[*]} ${jobs[END]}"
}

# One process, here: in the container where there is one.
once() {
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        [[ -z ${PRISM_NEMO_CONTAINER:-} || $PRISM_NEMO_CONTAINER == *.sif ]] || die 'in a container of pyxis: sbatch slurm/pipeline.sh'
        SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 bash "$home/slurm/rank.sh" "$@"
        return
    fi
    local -a options
    step_options 1 0 1
    srun "${options[@]}" bash "$home/slurm/rank.sh" "$@"
}

# Two chains at once would write into the same folders.
refuse_twice() {
    [[ -f $journal ]] || return
    local -a alive
    mapfile -t alive < <(squeue --noheader --me --format=%A | sort --numeric-sort --unique | grep -Fxf "$journal")
    ((${#alive[@]})) || return
    # This job was itself requeued between two submissions.
    if ((${SLURM_RESTART_COUNT:-0})); then scancel "${alive[@]}"; return; fi
    die "jobs of this pipeline are there still: wait for them, or scancel ${alive[*]}"
}

# submit NAME SCRIPT "STAGES THAT IT NEEDS" ARGUMENT...
submit() {
    local name=$1 script=$2 needed id own="PRISM_NEMO_SBATCH_${1//-/_}" after=
    local -a flags more
    for needed in $3; do [[ -z ${jobs[$needed]:-} ]] || after+=:${jobs[$needed]}; done
    shift 3
    read -ra more <<<"${PRISM_NEMO_SBATCH:-} ${!own:-}"
    flags=(--parsable --job-name="$(basename "$directory")-$name")
    [[ -z $after ]] || flags+=(--dependency="afterok$after" --kill-on-invalid-dep=yes)
    [[ -z ${SLURM_JOB_ACCOUNT:-} ]] || flags+=(--account="$SLURM_JOB_ACCOUNT")
    [[ -z ${SLURM_JOB_PARTITION:-} ]] || flags+=(--partition="$SLURM_JOB_PARTITION")
    [[ -z ${SLURM_JOB_QOS:-} ]] || flags+=(--qos="$SLURM_JOB_QOS")
    # Without the variables of this job: it would hand them on, and the other has its own. SLURM_CONF is where SLURM is.
    id=$(conf=${SLURM_CONF:-}; unset "${!SLURM_@}"; [[ -z $conf ]] || export SLURM_CONF=$conf
        sbatch "${flags[@]}" "${more[@]}" "$home/slurm/$script.sh" "$@") || {
        ((${#jobs[@]} == 0)) || scancel "${jobs[@]}"
        die "$name was refused: nothing is left of this pipeline in the queue"
    }
    jobs[$name]=${id%%;*}
    echo "${jobs[$name]}" >>"$journal"
    say "$name: job ${jobs[$name]}${after:+, after ${after#:}}"
}

if [[ -n ${PRISM_NEMO_PIPELINE_END:-} ]]; then prism_job pipeline "$@" --end; else submit_all "$@"; fi
