#!/usr/bin/env bash
# launch/finetune.py under accelerate launch, on one host or several; first the preflight. --help says how.
set -euo pipefail
script=launch/accelerate.sh
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'END_OF_USAGE'
usage: launch/accelerate.sh [option ...] [option of launch/finetune.py ...]

One host:       launch/accelerate.sh --config configs/finetune/classify.yaml --model MODEL --data DATA --output_dir runs/a
Several, on each of them the same but for --machine-rank:
                launch/accelerate.sh --num-machines 2 --machine-rank 0 --main-process-ip HOST1 --config ...

  --config-file FILE        accelerate's (default configs/accelerate/fsdp2.yaml); ddp.yaml and deepspeed_zero2.yaml, deepspeed_zero3.yaml
                            are there too
  --script FILE             a training script of your own (default launch/finetune.py)
  --num-machines N          hosts (default 1)
  --machine-rank N          number of this one: 0 is the first (default 0)
  --main-process-ip HOST    the first host, by an address or name that all hosts reach it by
  --main-process-port PORT  a free port there (default 29500); the preflight uses the one above it
  --num-processes N         processes of all hosts together (default: this host's GPUs, or 1, times the hosts)
  --mixed-precision DTYPE   no, bf16, fp16 or fp8 (default: of the config file)
  --cpu                     train on the CPU, also LDADAM_CPU=1; without it a host without a GPU is an error
  --log-dir DIR             a file for each rank's output, beside what is printed
  --no-preflight            start without it, also PREFLIGHT=0
  --dry-run                 print the commands instead

PYTHON is the interpreter (default: of the activated environment, or .venv); OMP_NUM_THREADS the CPU threads of a process
(default: cores / processes of this host). PYTHONFAULTHANDLER=1, NCCL_DEBUG=WARN and
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True are set unless you set them. SIGTERM, SIGINT, SIGHUP and SIGUSR1 are handed on as SIGTERM.
END_OF_USAGE
}

# shellcheck source=launch/common.sh
source "$repository/launch/common.sh"

declare -A option=(
    [config-file]="$repository/configs/accelerate/fsdp2.yaml" [script]="$repository/launch/finetune.py"
    [num-machines]=1 [machine-rank]=${SLURM_NODEID:-0} [main-process-ip]='' [main-process-port]='' [num-processes]=''
    [mixed-precision]='' [log-dir]=''
)
parse_options "$@"

for name in config-file script; do
    [[ -r ${option[$name]} ]] || die "--$name ${option[$name]}: no such file"
done
expect_number num-machines 1
expect_number machine-rank 0
: "${option[num-processes]:=$((${option[num-machines]} * $(processes_of_host)))}"
expect_number num-processes "${option[num-machines]}"
((10#${option[machine-rank]} < 10#${option[num-machines]})) ||
    die "--machine-rank ${option[machine-rank]}: expected less than --num-machines ${option[num-machines]}"
((10#${option[num-processes]} % 10#${option[num-machines]} == 0)) ||
    die "--num-processes ${option[num-processes]} are of all hosts: expected a multiple of --num-machines ${option[num-machines]}"
if ((10#${option[num-machines]} > 1)); then
    [[ -n ${option[main-process-ip]} ]] || die "--num-machines ${option[num-machines]} needs --main-process-ip, the address of the first"
fi
: "${option[main-process-port]:=29500}"
expect_number main-process-port 1
python=$(find_python)

"$python" "$repository/launch/accelerate_config.py" "${option[config-file]}" || exit 2

launcher=(
    "--config_file=${option[config-file]}" "--num_processes=${option[num-processes]}"
    "--num_machines=${option[num-machines]}" "--machine_rank=${option[machine-rank]}"
)
for name in main-process-ip mixed-precision; do
    [[ -z ${option[$name]} ]] || launcher+=("--${name//-/_}=${option[$name]}")
done
# accelerate refuses DDP, but not FSDP and DeepSpeed, for one process.
if ((10#${option[num-processes]} == 1)) && grep -q '^distributed_type: *MULTI_GPU' "${option[config-file]}"; then
    die "--num-processes 1 with ${option[config-file]}: DDP takes two processes or more. For one, start launch/finetune.py by itself"
fi

environment=(
    "${defaults[@]}" "PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}"
    "OMP_NUM_THREADS=$(threads_of_process $((10#${option[num-processes]} / 10#${option[num-machines]})))"
)
if ((cpu)); then environment+=(CUDA_VISIBLE_DEVICES=); fi
accelerate=(env "${environment[@]}" "$python" -m accelerate.commands.launch "${launcher[@]}")
# Meetings apart, as one host may be done with the preflight while another is not.
check=(
    "${accelerate[@]}" "--main_process_port=$((10#${option[main-process-port]} + 1))"
    --module ldadam_dist.preflight --output-dir "$(output_folder)"
)
logs=${option[log-dir]}
train=(
    "${accelerate[@]}" "--main_process_port=${option[main-process-port]}" ${logs:+"--log_dir=$logs" --tee=3} "${option[script]}"
    "${training[@]}"
)
check_and_train
