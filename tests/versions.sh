#!/usr/bin/env bash
# The hooks' and engines' tests with the oldest versions that pyproject.toml allows, in an environment of their own.
#
#   tests/versions.sh [--dry_run] [--constraints FILE] [--folder DIR]     # DIR (runs/versions) takes 6 GB
#
# Private names of other packages go with any release: what the tests of one environment say is true of its versions.
# An environment that is whole is kept, and used again while the constraints are the same. PYTHON (python3.11) makes it;
# pip's own variables, such as PIP_INDEX_URL, say where from. --dry_run prints the commands and runs none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage="usage: tests/versions.sh [--dry_run] [--constraints FILE] [--folder DIR]"
refuse() {
  echo "tests/versions.sh: $1; $usage" >&2
  exit 2
}
constraints=constraints/oldest.txt folder=runs/versions dry=""
while [ $# -gt 0 ]; do
  case "$1" in
    --dry_run) dry=yes ;;
    --constraints | --folder)
      [ -n "${2-}" ] || refuse "$1 must have a value"
      if [ "$1" = --folder ]; then folder=$2; else constraints=$2; fi
      shift
      ;;
    --help) echo "$usage"; exit ;;
    *) refuse "unknown argument $1" ;;
  esac
  shift
done
[ -f "$constraints" ] || refuse "--constraints must be a file, got $constraints"
# What touches torch's, DeepSpeed's, Accelerate's and transformers' private names.
tests=(
  tests/unit/test_seams.py tests/unit/test_fsdp_units.py tests/unit/test_deepspeed_ops.py
  tests/unit/test_engine_config.py tests/unit/test_transformers.py
  tests/distributed/test_comm_hooks.py tests/distributed/test_comm_hook_states.py
  tests/distributed/test_comm_hook_attached.py tests/distributed/test_fsdp.py
  tests/distributed/test_initialize.py tests/distributed/test_scope.py tests/distributed/test_timeouts.py
  tests/distributed/test_trainer.py tests/distributed/test_resume_ranks.py tests/distributed/test_resume_run_ranks.py
)
run() {
  echo "+ $*"
  [ -n "$dry" ] || "$@"
}
venv="$folder/$(basename "$constraints" .txt)"
# Whole, and of these constraints: the mark is a copy of them.
if [ -n "$dry" ] || ! cmp -s "$constraints" "$venv/constraints.txt"; then
  run rm -rf "$venv"
  run "${PYTHON:-python3.11}" -m venv "$venv"
  run "$venv/bin/pip" install -q -e '.[test]' -c "$constraints"
  run cp "$constraints" "$venv/constraints.txt"
fi
export OMP_NUM_THREADS=1
run "$venv/bin/python" -m ds_wsi.cli env
run "$venv/bin/python" -m pytest -q "${tests[@]}"
run "$venv/bin/python" -m ds_wsi.cli doctor
