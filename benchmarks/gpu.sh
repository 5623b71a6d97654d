#!/usr/bin/env bash
# What needs a CUDA GPU, within nine minutes: the tests of the kernels on it, then both benchmarks.
#
#     bash benchmarks/gpu.sh [FOLDER]
#
# FOLDER (default benchmarks/results) gets path.txt, tests.txt, checks.txt, ops-checks-<device>.json, crossover.txt,
# losses-gpu.csv, ops-<device>.csv and status.txt. PYTHON names the interpreter (default python); torch with Triton,
# FrEIA, safetensors and huggingface_hub must be importable there, the package itself is taken from src/. A part that
# fails or runs out of time is named in status.txt and does not stop the next one.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-benchmarks/results}
python=${PYTHON:-python}
reason=$("$python" -c '
import torch
print("" if torch.cuda.is_available() else "no CUDA device (torch.cuda.is_available() is false)")') || exit 1
[[ ${MGHF_LOSS_OPS:-} != torch ]] || reason="MGHF_LOSS_OPS=torch switches the kernels off"
if [[ -n $reason ]]; then
    echo "gpu.sh: nothing to measure: $reason" >&2
    exit 1
fi
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_DEFAULT_FP_FUSION=1
: >"$folder/status.txt"

part() { # part NAME SECONDS COMMAND...: run it within the time, note how it ended
    local name=$1 seconds=$2 start=$SECONDS code=0
    shift 2
    echo "== $name (at most $seconds s)"
    timeout -k 5 "$seconds" "$@" || code=$?
    echo "$name: exit $code after $((SECONDS - start)) s" | tee -a "$folder/status.txt"
}

cuda_tests() {
    if "$python" -c 'import pytest' 2>/dev/null; then
        "$python" -m pytest -q -p no:cacheprovider -o addopts= tests/test_cuda.py
    else # the file runs by itself too
        "$python" tests/test_cuda.py
    fi >"$folder/tests.txt" 2>&1
    local code=$?
    tail -n 25 "$folder/tests.txt"
    return $code
}
path() {
    "$python" -c 'import mghf_loss.ops as ops; print(ops.active_path())' | tee "$folder/path.txt"
}
checks() {
    "$python" -m benchmarks.ops_checks --out "$folder" | tee "$folder/checks.txt"
}
crossover() {
    "$python" -m benchmarks.ops --device cuda --crossover | tee "$folder/crossover.txt"
}
losses() {
    "$python" -m benchmarks.losses --device cuda --batches 16 --sizes 256 --rounds 10 --csv "$folder/losses-gpu.csv" \
        --only MGHFnLoss MGHFLoss "MGHFnLoss low memory" "MGHFLoss low memory" "MGHFLoss dense" content "content + style" \
        "content + patch_nce" "lpips alex" "lpips vgg" "SR step"
}
export -f path cuda_tests checks crossover losses
export folder python

# 530 s together
part path 40 bash -c "set -o pipefail; path"
part tests 190 bash -c cuda_tests
part checks 60 bash -c "set -o pipefail; checks"
part crossover 40 bash -c "set -o pipefail; crossover"
part losses 70 bash -c losses
part ops 130 "$python" -m benchmarks.ops --device cuda --sample 0.01 --budget 0.1 --limit 100 --out "$folder"
cat "$folder/status.txt"
! grep -qv "exit 0" "$folder/status.txt"
