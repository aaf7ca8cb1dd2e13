#!/usr/bin/env bash
# The first hour on a GPU: checks, benchmarks and the main job, one after the other, into launch/results.
#
#   launch/gpu_day.sh [--quick]        # from the checkout's root, in the project's environment
#
# Every part has a limit of time and leaves a mark in runs/gpu_day when it has ended well: run the script again and it
# goes on with what is missing. A part that fails is named at the end, costs the others nothing, and makes the exit
# status 1. --quick takes small sizes: on a device with little memory, or on a simulated one.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
quick=""
for argument in "$@"; do
  case "$argument" in
    --quick) quick="--quick" ;;
    *) echo "unknown argument $argument; usage: launch/gpu_day.sh [--quick]" >&2; exit 2 ;;
  esac
done
python - <<'PY' || exit 1
import sys, torch
if not torch.cuda.is_available():
    sys.exit("launch/gpu_day.sh needs a GPU that torch sees, got none: see nvidia-smi, and torch.version.cuda")
free, total = torch.cuda.mem_get_info()
print(f"{torch.cuda.get_device_name()}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, torch {torch.__version__}")
PY
marks="runs/gpu_day${quick:+_quick}"
results="launch/results"
[ -z "$quick" ] || results="$marks/results"
mkdir -p "$marks" "$results"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
failed=()

# part NAME SECONDS COMMAND...: once, within its time, with its output in a log
part() {
  local name=$1 limit=$2
  shift 2
  if [ -f "$marks/$name.done" ]; then
    echo "$name: done before"
    return
  fi
  echo "$name: $* (at most $limit s, log in $marks/$name.log)"
  local started=$SECONDS
  if timeout --kill-after=30 "$limit" "$@" > "$marks/$name.log" 2>&1; then
    echo "$name: done in $((SECONDS - started)) s"
    touch "$marks/$name.done"
  else
    local status=$?
    [ "$status" -ne 124 ] || echo "$name: out of its $limit s"
    failed+=("$name (status $status)")
    tail -n 5 "$marks/$name.log"
  fi
}

demo=(--demo_dir "$marks/slides" --tiles_dir "$marks/tiles" --num_train_epochs 1 --dataloader_num_workers 2)
[ -z "$quick" ] || demo+=(--encoder resnet10t --tile_size_px 64 --tiles_per_slide 6)

part exact 240 python -m pytest -q -m gpu tests/gpu
part partition_gpu 600 python launch/benchmark.py partition_gpu $quick --output_dir "$results" \
  --option "rows=$marks/partition_gpu_rows.json"
part train 600 python launch/train.py "${demo[@]}" --output_dir "$marks/train"
part train_offload 600 python launch/train.py "${demo[@]}" --partition offload --output_dir "$marks/train_offload"
part train_fp16 600 python launch/train.py "${demo[@]}" --fp16 --partition recompute --eval_precision fp16 \
  --output_dir "$marks/train_fp16"
part train_beside 900 python launch/train.py "${demo[@]}" --validate_beside --output_dir "$marks/train_beside"
part train_deepspeed 900 deepspeed --num_gpus 1 launch/train.py --deepspeed ds_configs/papers.json "${demo[@]}" \
  --output_dir "$marks/train_deepspeed"
part sweep 900 python launch/benchmark.py sweep $quick --output_dir "$results"

if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  echo "run the script again: it goes on with these" >&2
  exit 1
fi
echo "all parts are done: JSON and plots in $results, logs in $marks"
