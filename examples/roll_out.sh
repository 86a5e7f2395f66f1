#!/usr/bin/env bash
# Put a second version beside the first, move the alias to it, and take it back; servers run on.
#
#   LORARY_REGISTRY=/path/to/registry examples/roll_out.sh FIRST_DIR SECOND_DIR NAME [PUSH_OPTION...]
#
# Each DIR is a PEFT folder such as `lorary train` makes. A running server of that registry answers each
# call with the version that the alias means when the call comes. Options such as --base FOLDER go to
# `registry push`.
set -euo pipefail

first=${1:?usage: examples/roll_out.sh FIRST_DIR SECOND_DIR NAME}
second=${2:?usage: examples/roll_out.sh FIRST_DIR SECOND_DIR NAME}
name=${3:?usage: examples/roll_out.sh FIRST_DIR SECOND_DIR NAME}
shift 3

registry push "$first" "$name" --alias prod "$@"
registry push "$second" "$name" --alias canary "$@"
registry verify "$name@canary"
registry promote "$name@canary" prod --reason "the canary is fine"
registry rollback "$name" prod --reason "second thoughts"
registry log "$name" --alias prod
