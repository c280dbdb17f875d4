# shellcheck shell=bash disable=SC2004,SC2154  # arrays and names that the scripts which source this define
# What the launch scripts share. Each has defined before: script, its name; usage, a function; option, an associative
# array of its options and their defaults.

die() {
    echo "$script: $*" >&2
    exit 2
}

# What ranks are told unless the environment says otherwise: a trace of Python's stack where a process crashes, warnings of
# NCCL's, and memory whose segments grow, which fragments less. torch before 2.9 knows the last by this name only.
defaults=()
for pair in PYTHONFAULTHANDLER=1 NCCL_DEBUG=WARN PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True; do
    if [[ ! -v ${pair%%=*} && ($pair != PYTORCH_* || ! -v PYTORCH_ALLOC_CONF) ]]; then
        defaults+=("$pair")
    fi
done

# Options of the script go into `option`; --cpu, --dry-run, --no-preflight and --help are common. All others, and what follows
# "--", are for launch/pretrain.py and go into `training`.
parse_options() {
    training=() dry_run=0 preflight=${PREFLIGHT:-1} cpu=${LDADAM_CPU:-0}
    local name
    while (($#)); do
        name=${1%%=*} name=${name#--} name=${name//_/-}
        if [[ $1 == -- ]]; then
            training+=("${@:2}")
            break
        elif [[ $1 == -h || $1 == --help ]]; then
            usage
            exit 0
        elif [[ $1 == --dry-run ]]; then
            dry_run=1
        elif [[ $1 == --cpu ]]; then
            cpu=1
        elif [[ $1 == --no-preflight ]]; then
            preflight=0
        elif [[ $1 == --* && -v option[$name] ]]; then
            if [[ $1 == *=* ]]; then
                option[$name]=${1#*=}
            else
                (($# > 1)) || die "$1 needs a value (--help lists the options)"
                option[$name]=$2
                shift
            fi
        else
            training+=("$1")
        fi
        shift
    done
}

# A whole number, at least the second argument: expect_number NAME MINIMUM
expect_number() {
    if [[ ! ${option[$1]} =~ ^[0-9]+$ ]] || ((10#${option[$1]} < $2)); then
        die "--$1 ${option[$1]}: expected a whole number, at least $2"
    fi
}

# The folder that launch/pretrain.py will write to, for the preflight; runs/ is its default.
output_folder() {
    local index folder=runs config
    for index in "${!training[@]}"; do
        config=
        case ${training[index]} in
            --config) config=${training[index + 1]:-} ;;
            --config=*) config=${training[index]#*=} ;;
        esac
        if [[ -r $config ]]; then
            folder=$(sed -n "s/^output_dir: *[\"']\{0,1\}\([^\"'#]*[^\"'# ]\).*/\1/p" "$config" | tail -n 1)
            if [[ -z $folder || $folder == null ]]; then folder=runs; fi
        fi
        case ${training[index]} in
            --output_dir) folder=${training[index + 1]:-runs} ;;
            --output_dir=*) folder=${training[index]#*=} ;;
        esac
    done
    echo "$folder"
}

# The interpreter: PYTHON, an activated environment's, the repository's, the system's.
find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        echo "$PYTHON"
    elif [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $repository/.venv/bin/python ]]; then
        echo "$repository/.venv/bin/python"
    else
        command -v python || command -v python3 || die "no python found: set PYTHON"
    fi
}

# GPUs of this host, as far as CUDA_VISIBLE_DEVICES shows them; -1, void and SLURM's NoDevFiles hide what follows, as in CUDA.
gpus_of_host() {
    if [[ -v CUDA_VISIBLE_DEVICES ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed -E '/^ *(-|void|none|NoDevFiles)/,$d' | grep -c '[^ ]' || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

# Processes of one host: its GPUs; 1 without any, and with --cpu.
processes_of_host() {
    local count=0
    if ((!cpu)); then count=$(gpus_of_host); fi
    echo $((count > 0 ? count : 1))
}

# A host whose GPUs are not seen would train on its CPU, a hundred times slower, and say so only in the log.
expect_gpu() {
    if ((cpu)) || (($(gpus_of_host))); then return; fi
    local found
    found="no GPU on $(hostname)"
    if [[ -v CUDA_VISIBLE_DEVICES ]]; then
        found+=": CUDA_VISIBLE_DEVICES is '$CUDA_VISIBLE_DEVICES'"
    elif ! command -v nvidia-smi >/dev/null; then
        # Not all hosts have the program: containers, and GPUs of other vendors.
        if "${python:-python3}" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then return; fi
        found+=": no nvidia-smi, and torch sees none"
    else
        found+=": nvidia-smi lists none"
    fi
    found+=". Look at the driver, the container's --gpus or SLURM's --gpus-per-node, or give --cpu to train on the CPU"
    if ((dry_run)); then echo "$script: $found" >&2; else die "$found"; fi
}

# CPU threads of each of so many processes.
threads_of_process() {
    local cores
    cores=$(nproc)
    echo "${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}"
}

# Print a command as it could be typed in.
show() {
    local words
    printf -v words '%q ' "$@"
    echo "${words% }"
}

# Run a command in a process group of its own, and wait for it. A signal to this script asks the command to end as SIGTERM
# does: launch/pretrain.py finishes its step and saves. Returns its exit code; `stopped` says whether there was a signal.
# With `stuck_after`, in seconds, torchrun is ended when it does not notice that all its ranks have.
run_and_forward() {
    local child='' status watcher='' waited=0
    stopped=0
    trap 'stopped=1; [[ -z $child ]] || kill -TERM -- "-$child" 2>/dev/null || true' TERM INT HUP USR1
    set -m
    "$@" &
    child=$!
    set +m
    if ((stopped)); then kill -TERM -- "-$child" 2>/dev/null || true; fi
    if [[ -n ${stuck_after:-} ]]; then
        end_if_stuck "$child" &
        watcher=$!
    fi
    while kill -0 "$child" 2>/dev/null; do
        wait "$child" || true # a signal ends this, and the loop waits on
    done
    status=0
    wait "$child" || status=$?
    # The deepspeed launcher ends at once, while its ranks still save.
    while ((stopped)) && kill -0 -- "-$child" 2>/dev/null && ((waited++ < 600)); do sleep 0.2; done
    trap - TERM INT HUP USR1
    if [[ -n $watcher ]]; then kill "$watcher" 2>/dev/null || true; fi
    return "$status"
}

# torchrun asks the first host's store for news all the time. If the link is cut meanwhile it waits for the answer until TCP
# gives up, a quarter of an hour; its ranks have given up by then, and are defunct processes that nobody has looked at.
end_if_stuck() {
    local child children seconds=0 state
    while sleep 2 >/dev/null 2>&1; do
        children=$(cat "/proc/$1/task/"*/children 2>/dev/null) || true
        state=none
        for child in $children; do
            if grep -q '^State:[[:space:]]*Z' "/proc/$child/status" 2>/dev/null; then
                if [[ $state == none ]]; then state=defunct; fi
            else
                state=running
            fi
        done
        if [[ $state == defunct ]]; then seconds=$((seconds + 2)); else seconds=0; fi
        if ((seconds >= stuck_after)); then
            echo "$script: all ranks on $(hostname) have ended, and torchrun hears nothing from the rendezvous on the first" \
                "host: the link to it is gone, or it is. Ending torchrun." >&2
            kill -KILL -- "-$1" 2>/dev/null || true
            return
        fi
    done
}

# Run the command in the array `check`, the preflight, and then that in `train`; or print them.
check_and_train() {
    local status=0
    expect_gpu
    if ((dry_run)); then
        if ((preflight)); then show "${check[@]}"; fi
        show "${train[@]}"
        return
    fi
    if ((preflight)); then
        run_and_forward "${check[@]}" || status=$?
        if ((stopped)); then
            echo "$script: stopped by a signal on $(hostname), in the preflight." >&2
            return 1
        elif ((status)); then
            echo "$script: the preflight on $(hostname) failed with exit code $status, nothing was started. What is wrong" \
                "stands above, after 'preflight failed'. If the hosts did not find each other: is this running on all of" \
                "them, with the same address and port? --no-preflight starts without it." >&2
            return 1
        fi
    fi
    run_and_forward "${train[@]}" || status=$?
    if ((stopped)); then
        echo "$script: stopped by a signal on $(hostname) (exit code $status)." >&2
    elif ((status)); then
        echo "$script: training failed on $(hostname) with exit code $status; the reason stands above. 'Connection closed" \
            "by peer', 'Timed out' or 'Connection reset' in it: another host, or the link to it, is gone. Start the same" \
            "command on all hosts again to go on from the newest checkpoint in $(output_folder)." >&2
    fi
    return "$status"
}
