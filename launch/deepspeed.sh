#!/usr/bin/env bash
# launch/pretrain.py under the deepspeed launcher, on one host or several; first the preflight. --help says how.
set -euo pipefail
script=launch/deepspeed.sh
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'END'
usage: launch/deepspeed.sh [option ...] --deepspeed JSON [option of launch/pretrain.py ...]

One host:  launch/deepspeed.sh --config configs/pretrain/llama_350m.yaml --deepspeed configs/deepspeed/zero2.json
Several:   launch/deepspeed.sh --hostfile hosts --config ... --deepspeed ... --output_dir /shared/runs/a
           on the first of them; it starts the others with ssh. Repository, python and data have the same paths everywhere

  --hostfile FILE           a line "HOST slots=N" for each host, N processes on it
  --num-gpus N              processes on each host, on a CPU too (default: this host's GPUs, or 1; with a hostfile its slots)
  --num-nodes N             only the first N hosts of the file
  --include SPEC, --exclude SPEC
                            some hosts or GPUs of the file, as deepspeed has it: host1@host2:0,1
  --master-addr HOST        address of the first host, as the others reach it (default: the first of its hostname -I)
  --master-port PORT        a free port there (default 29500)
  --launcher NAME           pdsh (default), or another that deepspeed knows: openmpi, mpich, impi, mvapich, slurm
  --ssh-port PORT           of the hosts (default: ssh's)
  --log-dir DIR             each rank's output goes to a file there, and is not printed
  --node-rank N             start only host N of the file, this one, without ssh; needs --hostfile and --master-addr, and the
                            same command with the other numbers on the other hosts
  --cpu                     train on the CPU of hosts without a GPU, also LDADAM_CPU=1; without it that is an error
  --no-preflight            start without it, also PREFLIGHT=0
  --dry-run                 print the commands instead

pdsh takes only variables along that are named: this script hands on NCCL_*, GLOO_*, TORCH_*, PYTORCH_*,
PYTHONFAULTHANDLER, HF_HOME, HF_HUB_OFFLINE, OMP_NUM_THREADS and what ~/.deepspeed_env and ./.deepspeed_env say, a line
NAME=VALUE each. They show in the process list of the hosts: no secrets there. PYTHONFAULTHANDLER=1, NCCL_DEBUG=WARN and
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True are set unless you set them. PYTHON is the interpreter. SIGTERM, SIGINT,
SIGHUP and SIGUSR1 are handed on as SIGTERM.
END
}

# shellcheck source=launch/common.sh
source "$repository/launch/common.sh"

declare -A option=(
    [hostfile]='' [num-gpus]='' [num-nodes]='' [include]='' [exclude]='' [master-addr]='' [master-port]=29500
    [launcher]=pdsh [ssh-port]='' [node-rank]='' [log-dir]=''
)
parse_options "$@"

for name in num-gpus num-nodes ssh-port; do
    [[ -z ${option[$name]} ]] || expect_number "$name" 1
done
expect_number master-port 1
python=$(find_python)
# Its launcher shows each process a GPU by number, whatever the environment says.
if ((cpu)) && (($(gpus_of_host))); then die "--cpu on $(hostname), which has GPUs: deepspeed would use them. Leave it out"; fi
launcher=()
processes=${option[num-gpus]}
if [[ -n ${option[hostfile]} ]]; then
    [[ -r ${option[hostfile]} ]] || die "--hostfile ${option[hostfile]}: no such file"
    launcher+=("--hostfile=${option[hostfile]}")
    slots=$(sed -n 's/#.*//; s/.*slots *= *\([0-9][0-9]*\).*/\1/p' "${option[hostfile]}" | sort -n | tail -n 1)
    [[ -n $slots ]] || die "--hostfile ${option[hostfile]}: expected lines 'HOST slots=N'"
    : "${processes:=$slots}"
else
    for name in num-nodes include exclude master-addr ssh-port node-rank; do
        [[ -z ${option[$name]} ]] || die "--$name needs --hostfile"
    done
    : "${processes:=$(processes_of_host)}"
    option[num-gpus]=$processes
    launcher+=("--hostfile=") # not deepspeed's default, /job/hostfile
fi
for name in num-gpus num-nodes include exclude master-addr ssh-port; do
    [[ -z ${option[$name]} ]] || launcher+=("--${name//-/_}=${option[$name]}")
done
launcher+=("--master_port=${option[master-port]}")
if [[ -n ${option[node-rank]} ]]; then
    expect_number node-rank 0
    [[ -n ${option[master-addr]} ]] || die "--node-rank needs --master-addr, the address of the first host"
    launcher+=(--no_ssh "--node_rank=${option[node-rank]}")
elif [[ -n ${option[hostfile]} ]]; then
    launcher+=("--launcher=${option[launcher]}")
    if [[ ${option[launcher]} == pdsh ]] && ((!dry_run)) && ! command -v pdsh >/dev/null; then
        die "pdsh is not installed: apt-get install pdsh; or start this script on every host, with --node-rank and --master-addr"
    fi
fi

# The variables that other hosts get, as lines NAME=VALUE.
hand_on() {
    local name file
    for file in ~/.deepspeed_env .deepspeed_env; do
        if [[ -r $file ]]; then grep -E '^[A-Za-z_][A-Za-z0-9_]*=' "$file" || true; fi
    done
    echo "OMP_NUM_THREADS=$(threads_of_process "$processes")"
    if ((${#defaults[@]})); then printf '%s\n' "${defaults[@]}"; fi
    for name in $(compgen -e | grep -E '^(NCCL_|GLOO_|TORCH_|PYTORCH_|PYTHONFAULTHANDLER$|HF_HOME$|HF_HUB_OFFLINE$)' || true); do
        echo "$name=${!name}"
    done
}

environment=("${defaults[@]}" "PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}" "OMP_NUM_THREADS=$(threads_of_process "$processes")")
if [[ -n ${option[hostfile]} && -z ${option[node-rank]} ]]; then
    # ssh that notices a host which is gone, where it would wait for it for hours; of options given twice it takes the first
    alive="-o ServerAliveInterval=10 -o ServerAliveCountMax=3"
    environment+=("PDSH_SSH_ARGS_APPEND=${PDSH_SSH_ARGS_APPEND:+$PDSH_SSH_ARGS_APPEND }$alive")
    if ((dry_run)); then
        echo "# FILE, variables for the hosts:"
        hand_on | sed 's/^/#   /'
        environment+=(DS_ENV_FILE=FILE)
    else
        variables=$(mktemp)
        trap 'rm -f "$variables"' EXIT
        hand_on >"$variables"
        environment+=("DS_ENV_FILE=$variables")
    fi
fi

deepspeed=(env "${environment[@]}" "$python" -m deepspeed.launcher.runner --log_level=warning "${launcher[@]}")
check=("${deepspeed[@]}" --module ldadam_dist.preflight --output-dir "$(output_folder)")
train=("${deepspeed[@]}" ${option[log-dir]:+"--enable_each_rank_log=${option[log-dir]}"} "$repository/launch/pretrain.py" "${training[@]}")
check_and_train
