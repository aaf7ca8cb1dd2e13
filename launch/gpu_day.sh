#!/usr/bin/env bash
# The first hour on a GPU: checks, benchmarks and the main job, one after the other, into launch/results.
#
#   launch/gpu_day.sh [--quick] [--only NAME[,NAME...]] [--output_dir DIR]     # in the project's environment
#
# Every part has a limit of time and leaves a mark in DIR (runs/gpu_day) when it has ended well: run the script again and
# it goes on with what is missing. A part that fails, or whose bounds do not hold, is named at the end, costs the others
# nothing, and makes the exit status 1. --only runs some parts; --help names them all. --quick takes small sizes, on a
# device with little memory or a simulated one, and leaves its results in DIR (runs/gpu_day_quick).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
parts=(exact partition_gpu peers tests train train_offload train_fp16 train_beside train_deepspeed sweep)
usage="usage: launch/gpu_day.sh [--quick] [--only NAME[,NAME...]] [--output_dir DIR]; the parts are ${parts[*]}"
refuse() {
  echo "launch/gpu_day.sh: $1; $usage" >&2
  exit 2
}
quick="" marks=""
only=("${parts[@]}")
while [ $# -gt 0 ]; do
  case "$1" in
    --quick) quick="--quick" ;;
    --only | --output_dir)
      [ -n "${2-}" ] || refuse "$1 must have a value"
      if [ "$1" = --only ]; then IFS=, read -ra only <<< "$2"; else marks=$2; fi
      shift
      ;;
    --help) echo "$usage"; exit ;;
    *) refuse "unknown argument $1" ;;
  esac
  shift
done
for name in "${only[@]}"; do
  [[ " ${parts[*]} " == *" $name "* ]] || refuse "unknown part $name"
done
python - <<'PY' || exit 1
import sys, torch
if not torch.cuda.is_available():
    sys.exit("launch/gpu_day.sh needs a GPU that torch sees, got none: see nvidia-smi, and torch.version.cuda")
free, total = torch.cuda.mem_get_info()
print(f"{torch.cuda.get_device_name()}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, torch {torch.__version__}")
PY
marks="${marks:-runs/gpu_day${quick:+_quick}}"
results="launch/results"
[ -z "$quick" ] || results="$marks/results"
mkdir -p "$marks" "$results"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
failed=()

# part NAME SECONDS COMMAND...: once, within its time, with its output in a log
part() {
  local name=$1 limit=$2
  shift 2
  [[ " ${only[*]} " == *" $name "* ]] || return 0
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

# partition_gpu takes over what is in its file of rows, and writes it again with the rest.
measure=(python launch/benchmark.py partition_gpu $quick --check --output_dir "$results"
  --option "rows=$marks/partition_gpu_rows.json" --option resume=yes)
demo=(--demo_dir "$marks/slides" --tiles_dir "$marks/tiles" --num_train_epochs 1 --dataloader_num_workers 2)
if [ -n "$quick" ] && [[ "${only[*]}" == *train* ]]; then
  manifest=$(python - "$marks/slides" <<'PY'
import sys
from ds_wsi.slides.demo import DemoPolicy, make_demo
print(make_demo(sys.argv[1], DemoPolicy(train=4, validation=2, test=2, max_side_px=352)))
PY
  ) || exit 1
  demo=(--manifest "$manifest" "${demo[@]:2}" --encoder resnet10t --tile_size_px 64 --tiles_per_slide 6 --eval_tiles 6)
fi
# DeepSpeed's launcher forgets CUDA_VISIBLE_DEVICES where it is told how many GPUs to take, and knows them by number only.
first=${CUDA_VISIBLE_DEVICES:-0}
first=${first%%,*}
if [[ "$first" =~ ^[0-9]+$ ]]; then
  deepspeed=(deepspeed --include "localhost:$first")
else
  deepspeed=(torchrun --nproc_per_node 1)
fi
largest=""
[ -n "$quick" ] || largest="--option sides=7680,10752,13824 --option minutes=8"

part exact 240 "${measure[@]}" --option parts=exact
part partition_gpu 600 "${measure[@]}" --option parts=image,large,bags,paper,largest --option minutes=8
part peers 400 "${measure[@]}" --option parts=peers --option minutes=5
part tests 600 python -m pytest -q -m gpu tests/gpu
part train 400 python launch/train.py "${demo[@]}" --output_dir "$marks/train"
part train_offload 400 python launch/train.py "${demo[@]}" --partition offload --output_dir "$marks/train_offload"
part train_fp16 400 python launch/train.py "${demo[@]}" --fp16 --partition recompute --eval_precision fp16 \
  --output_dir "$marks/train_fp16"
part train_beside 400 python launch/train.py "${demo[@]}" --validate_beside --output_dir "$marks/train_beside"
part train_deepspeed 600 "${deepspeed[@]}" launch/train.py --deepspeed ds_configs/papers.json "${demo[@]}" \
  --output_dir "$marks/train_deepspeed"
part sweep 600 python launch/benchmark.py sweep $quick --check --output_dir "$results" $largest

if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  echo "run the script again: it goes on with these" >&2
  exit 1
fi
echo "all parts are done: JSON and plots in $results, logs in $marks"
