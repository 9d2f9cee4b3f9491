#!/usr/bin/env bash
# Builds, tests and benchmarks on a GPU machine, with what is installed there and without a network.
#   tests/gpu/run.sh RESULTS [pytest arguments]
# Every step writes RESULTS/<step>.log; a failed step does not stop the others, but the script's exit code.
set -uo pipefail
results=$(mkdir -p "${1:?usage: tests/gpu/run.sh RESULTS [pytest arguments]}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
failed=()

step() {  # step NAME SECONDS COMMAND...
  local name=$1 seconds=$2 started=$SECONDS status
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" 2>&1 | tee "$results/$name.log"
  status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || failed+=("$name ($status)")
  echo "== $name: exit code $status after $((SECONDS - started)) s"
}

sanitize() {
  for tool in memcheck racecheck; do
    echo "-- $tool"
    PYTHONPATH=$PWD:$PWD/tests/gpu PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$tool" --error-exitcode 1 python3 tests/gpu/sanitizer_driver.py || return 1
  done
}
export -f sanitize

MOE_EP_BUILD_CUDA=1 step build 120 python3 setup.py -q build_ext --inplace
step doctor 120 python3 -m moe_ep.cli doctor
step tests 400 python3 -m pytest tests -m gpu -s --continue-on-collection-errors "$@"
if command -v compute-sanitizer >/dev/null; then
  step sanitizer 300 bash -c sanitize
else
  echo "== sanitizer: skipped, there is no compute-sanitizer"
fi
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -ge 2 ]; then
  step bench 300 python3 -m moe_ep.cli bench --backend collective --nproc "$gpus" --num-tokens 4096 --hidden 7168 \
    --num-topk 8 --num-experts 256 --dtype bfloat16 --json "$results/bench.json" --png "$results/bench.png"
else
  echo "== bench: skipped, it needs 2 GPUs and there is $gpus"
fi

if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all steps passed; results are in $results"
