#!/usr/bin/env bash
# Builds, tests and benchmarks on a GPU machine, with what is installed there and without a network.
#   [STEPS="build doctor tests sanitizer bench"] tests/gpu/run.sh RESULTS [pytest arguments]
# STEPS chooses steps; TESTS chooses test files (default: all that have GPU tests); TOOLS the sanitizer's tools.
# Every step writes RESULTS/<step>.log; a failed step does not stop the others, but the script's exit code.
set -uo pipefail
results=$(mkdir -p "${1:?usage: tests/gpu/run.sh RESULTS [pytest arguments]}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
steps=" ${STEPS:-build doctor tests sanitizer bench} "
failed=()

step() {  # step NAME SECONDS COMMAND...
  local name=$1 seconds=$2 started=$SECONDS status
  shift 2
  [[ $steps == *" ${name%%:*} "* ]] || return 0
  echo "== $name"
  timeout "$seconds" "$@" 2>&1 | tee "$results/${name/:/-}.log"
  status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || failed+=("$name ($status)")
  echo "== $name: exit code $status after $((SECONDS - started)) s"
}

skip() {  # skip NAME REASON
  if [[ $steps == *" $1 "* ]]; then echo "== $1: skipped, $2"; fi
}

test_file() {
  python3 -m pytest -s -m gpu --durations 5 "$@"
  local status=$?
  [ $status = 5 ] && status=0  # the pytest arguments chose none of this file's tests
  return $status
}

sanitize() {
  PYTHONPATH=$PYTHONPATH:$PWD/tests PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$1" --kernel-name kernel_substring=moe_ep --error-exitcode 1 \
    python3 tests/gpu/sanitizer_driver.py
}
export -f test_file sanitize

MOE_EP_BUILD_CUDA=1 step build 180 python3 setup.py -q build_ext --inplace
step doctor 120 python3 -m moe_ep.cli doctor
# A process for each file: an error that breaks CUDA in one leaves the others alone.
for file in ${TESTS:-$(grep -rlE --include='test_*.py' 'mark\.gpu|needs_gpu' tests | sort)}; do
  step "tests:$(basename "$file" .py)" 1800 bash -c 'test_file "$@"' - "$file" "$@"
done
if command -v compute-sanitizer >/dev/null; then
  for tool in ${TOOLS:-memcheck racecheck}; do step "sanitizer:$tool" 300 bash -c "sanitize $tool"; done
else
  skip sanitizer "there is no compute-sanitizer"
fi
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -ge 2 ]; then
  step bench 600 python3 -m moe_ep.cli bench --backend nvlink --nproc "$gpus" --num-tokens 4096,8192 \
    --json "$results/bench.json" --png "$results/bench.png"
  step bench:low-latency 120 python3 -m moe_ep.cli bench --low-latency --nproc "$gpus" --num-tokens 128 \
    --json "$results/low-latency.json"
else
  skip bench "it needs 2 GPUs and there is $gpus"
fi

if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all steps passed; results are in $results"
