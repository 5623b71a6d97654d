#!/usr/bin/env bash
# What needs a CUDA GPU, within nine minutes: the tests of the kernels on it, then both benchmarks.
#
#     bash benchmarks/gpu.sh [FOLDER]
#
# FOLDER (default benchmarks/results) gets tests.txt, ops-<device>.csv and .png, ops-checks-<device>.json,
# crossover.txt, losses-<device>.csv and status.txt. PYTHON names the interpreter (default python); torch with Triton,
# FrEIA, safetensors and huggingface_hub must be importable there, the package itself is taken from src/. A part that
# fails or runs out of time is named in status.txt and does not stop the next one.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-benchmarks/results}
python=${PYTHON:-python}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export PYTHONPATH="$PWD/src:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_DEFAULT_FP_FUSION=1
: >"$folder/status.txt"

part() { # part NAME SECONDS COMMAND...: run it within the time, note how it ended
    local name=$1 seconds=$2 start=$SECONDS code=0
    shift 2
    echo "== $name (at most $seconds s)"
    timeout "$seconds" "$@" || code=$?
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
losses() {
    "$python" benchmarks/losses.py --device cuda --batch 16 --size 256 --rounds 10 --csv "$folder/losses-gpu.csv" \
        --only MGHFnLoss MGHFLoss "MGHFLoss dense" content "content + style" "content + patch_nce" "lpips alex" "lpips vgg"
}
export -f cuda_tests losses
export folder python

"$python" -c 'import mghf_loss.ops as ops; print(ops.active_path())' | tee "$folder/path.txt"
part tests 200 bash -c cuda_tests
part checks 60 "$python" benchmarks/ops.py --device cuda --checks --out "$folder"
part crossover 40 bash -c '"$python" benchmarks/ops.py --device cuda --crossover | tee "$folder/crossover.txt"'
part losses 80 bash -c losses
part ops 150 "$python" benchmarks/ops.py --device cuda --sample 0.01 --budget 0.1 --limit 110 --out "$folder"
cat "$folder/status.txt"
! grep -qv "exit 0" "$folder/status.txt"
