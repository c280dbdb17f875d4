#!/usr/bin/env bash
# The image's entry point: `pretrain ...` is launch/torchrun.sh and `finetune ...` launch/accelerate.sh, with the same arguments
# as outside; anything else is a command.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

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
    -* | '')
        echo "docker/entrypoint.sh: expected pretrain, finetune or a command, found '${1:-}'" >&2
        exit 2
        ;;
    *) exec "$@" ;;
esac
