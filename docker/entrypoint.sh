#!/usr/bin/env bash
# The image's entry point: the words of its usage, with the same arguments as outside.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'END'
usage: docker run [option of docker ...] IMAGE pretrain | finetune | COMMAND [argument ...]

  pretrain ...   launch/torchrun.sh ...      pretrain --help has the options
  finetune ...   launch/accelerate.sh ...    finetune --help has them
  COMMAND ...    anything else: ldadam-dist doctor, launch/deepspeed.sh --config ..., bash
END
}

# With --user the system may not know the user: torch asks for a name, and caches want a home.
[[ -n ${USER:-} ]] || USER=$(id --user --name 2>/dev/null) || USER=$(id --user)
export USER
if [[ ! -w ${HOME:-/} ]]; then
    HOME=$(mktemp --directory)
    export HOME
    mkdir "$HOME/.cache"
fi

case ${1:-} in
    pretrain) exec "$repository/launch/torchrun.sh" "${@:2}" ;;
    finetune) exec "$repository/launch/accelerate.sh" "${@:2}" ;;
    -h | --help) usage ;;
    -* | '')
        echo "docker/entrypoint.sh: expected pretrain, finetune or a command, found '${1:-}'; --help says more" >&2
        exit 2
        ;;
    *) exec "$@" ;;
esac
