#!/usr/bin/env bash
# launch/pretrain.py under torchrun, on one host or several; first the preflight. --help says how.
set -euo pipefail
script=launch/torchrun.sh
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'END'
usage: launch/torchrun.sh [option ...] [option of launch/pretrain.py ...]

One host:       launch/torchrun.sh --config configs/pretrain/llama_350m.yaml
Several, on each of them the same:
                launch/torchrun.sh --nnodes 4 --rdzv-endpoint HOST1:29500 --config ... --output_dir /shared/runs/a

  --nnodes N | MIN:MAX      hosts; with MIN:MAX the run starts with MIN and takes up others as they come (default 1)
  --rdzv-endpoint HOST:PORT the first host, by an address or name that all hosts reach it by, and a free port; the
                            preflight uses the port above it (default port 29500)
  --node-rank N             0: this is the first host. Found out from the address if not given
  --nproc-per-node N        processes of this host (default: its GPUs, or 1)
  --max-restarts N          so often a failed run is started again on the hosts that are there (default 0)
  --log-dir DIR             a file for each rank's output, beside what is printed (default logs in the output folder; '' for none)
  --rdzv-id ID              name of the run, the same on all hosts (default pretrain)
  --join-timeout SECONDS    to wait for the other hosts (default 600)
  --stuck-timeout SECONDS   torchrun that does not notice that its ranks have ended, since the link to the first host is
                            gone, is ended after this (default 60). --timeout_minutes of the training is how long
                            ranks wait
  --cpu                     train on the CPU, also LDADAM_CPU=1; without it a host without a GPU is an error
  --no-preflight            start without it, also PREFLIGHT=0; for a host that joins a run which is already going on
  --dry-run                 print the commands instead

PYTHON is the interpreter (default: of the activated environment, or .venv); OMP_NUM_THREADS the CPU threads of a process
(default: cores / processes). PYTHONFAULTHANDLER=1, NCCL_DEBUG=WARN and PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True are
set unless you set them. SIGTERM, SIGINT, SIGHUP and SIGUSR1 are handed on as SIGTERM.
END
}

# shellcheck source=launch/common.sh
source "$repository/launch/common.sh"

declare -A option=(
    [nnodes]=1 [rdzv-endpoint]='' [node-rank]=${SLURM_NODEID:-} [nproc-per-node]='' [max-restarts]=0
    [rdzv-id]=pretrain [join-timeout]=600 [stuck-timeout]=60 [log-dir]=default
)
parse_options "$@"

[[ ${option[nnodes]} =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || die "--nnodes ${option[nnodes]}: expected N or MIN:MAX"
: "${option[nproc-per-node]:=$(processes_of_host)}"
expect_number nproc-per-node 1
expect_number max-restarts 0
expect_number join-timeout 1
expect_number stuck-timeout 2
[[ -z ${option[node-rank]} ]] || expect_number node-rank 0
python=$(find_python)

environment=(
    "${defaults[@]}" "PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}"
    "OMP_NUM_THREADS=$(threads_of_process "${option[nproc-per-node]}")"
    # How long the ranks have to save when they are asked to end; torchrun's default is 30 s.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}"
    # torchrun's --signals-to-handle, in the form that versions before 2.9 do not stumble over
    "PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
)

if ((cpu)); then environment+=(CUDA_VISIBLE_DEVICES=); fi

if [[ -n ${option[rdzv-endpoint]} ]]; then
    endpoint=${option[rdzv-endpoint]} port=29500
    if [[ $endpoint =~ ^(.*[^:]):([0-9]+)$ ]]; then
        endpoint=${BASH_REMATCH[1]} port=${BASH_REMATCH[2]}
    fi
    host=${endpoint#[} host=${host%]}
    # torch would compare names: it cannot tell where a host knows itself under another one, or as 127.0.1.1, and would tell
    # the others a name that they may not know. So who hosts the rendezvous, and each host's address, are given.
    read -r local_address is_host < <("$python" -I "$repository/ldadam_dist/network.py" "$host" 2>/dev/null) ||
        die "--rdzv-endpoint $endpoint: this host ($(hostname)) does not know the name, or has no route there"
    if [[ ${option[nnodes]} != 1 && $host != localhost && $host != 127.* && $host != ::1 && $local_address =~ ^(127\.|::1$) ]]; then
        die "--rdzv-endpoint $endpoint is $local_address on this host ($(hostname)), see its /etc/hosts; the others cannot" \
            "reach that. Give the first host's address instead, as the others see it"
    fi
    if [[ -n ${option[node-rank]} ]]; then is_host=$((option[node-rank] == 0)); fi
    common=(
        "--nnodes=${option[nnodes]}" --rdzv-backend=c10d "--local-addr=$local_address"
        "--rdzv-conf=is_host=$is_host,join_timeout=${option[join-timeout]}"
    )
    # Meetings apart, as one host may be done with the preflight while another is not.
    meet_to_check=("${common[@]}" "--rdzv-endpoint=$endpoint:$((port + 1))" "--rdzv-id=${option[rdzv-id]}-preflight")
    meet_to_train=("${common[@]}" "--rdzv-endpoint=$endpoint:$port" "--rdzv-id=${option[rdzv-id]}")
elif [[ ${option[nnodes]} == 1 ]]; then
    meet_to_check=(--standalone) meet_to_train=(--standalone)
else
    die "--nnodes ${option[nnodes]} needs --rdzv-endpoint HOST:PORT, the address of the first host"
fi

torchrun=(env "${environment[@]}" "$python" -m torch.distributed.run "--nproc-per-node=${option[nproc-per-node]}")
if [[ -n ${option[rdzv-endpoint]} ]]; then stuck_after=${option[stuck-timeout]}; fi
check=("${torchrun[@]}" "${meet_to_check[@]}" -m ldadam_dist.preflight --output-dir "$(output_folder)")
logs=${option[log-dir]}
if [[ $logs == default ]]; then logs=$(output_folder)/logs; fi
train=(
    "${torchrun[@]}" "${meet_to_train[@]}" ${logs:+"--log-dir=$logs" --tee=3} "--max-restarts=${option[max-restarts]}"
    "$repository/launch/pretrain.py" "${training[@]}"
)
check_and_train
