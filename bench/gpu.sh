#!/usr/bin/env bash
# Checks and measures everything on a CUDA device, in under ten minutes.
#
#   bench/gpu.sh                          true shapes, random weights
#   bench/gpu.sh FOLDER                   also whole pictures of a checkpoint
#   bench/gpu.sh --memory FOLDER          also whether --memory is kept (gpu_memory.py), which takes minutes more
#   bench/gpu.sh --steps decode,denoise   some of the steps: tests decode denoise curve large-decode large-denoise
#   bench/gpu.sh --miniature              the same on a CPU, with tiny models, to try this script itself
#
# Each step has its time, and one that fails keeps none of the others from running. Results go to $RESULTS (default
# bench/results), tables to stderr; a summary ends the output. Leaves with exit code 1 if a step failed.

set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
results=${RESULTS:-bench/results}
scratch=${SCRATCH:-${TMPDIR:-/tmp}}

miniature=no memory=no folder="" steps=""
while [ $# -gt 0 ]; do
    case $1 in
        --miniature) miniature=yes ;;
        --memory) memory=yes ;;
        --steps) shift; steps=${1:?--steps names steps, comma-separated} ;;
        -*) echo "error: no option $1; see the head of $0" >&2; exit 2 ;;
        *) folder=$1 ;;
    esac
    shift
done

# Sizes and ways: what is asked of an H100-class device, or what a CPU does in a moment (a busy one has more time).
if [ $miniature = yes ]; then
    common=(--device cpu --precision fp32 --threads 1 --miniature --here)
    large=128 larger=256 sizes=64,128 ways=whole,rows kernels= tiled= generate_steps=1 patience=20
else
    common=(--device cuda --precision bf16)
    large=4096 larger=32768 sizes=1024,2048,4096,8192,16384 ways=whole,compiled,rows kernels=,untuned tiled=,tiled generate_steps=20 patience=1
fi
common+=(--save --results "$results" --scratch "$scratch")

summary=() failed=0
# step NAME SECONDS COMMAND...: runs it, for at most so long.
step() {
    local name=$1 seconds=$(($2 * patience)) begun=$SECONDS outcome
    shift 2
    if [ -n "$steps" ] && [[ ",$steps," != *",$name,"* ]]; then return; fi
    echo "== $name" >&2
    timeout --kill-after=20 "$seconds" "$@"
    local code=$?
    case $code in
        0) outcome="done" ;;
        124 | 137) outcome="NOT DONE in $seconds s"; failed=1 ;;
        *) outcome="FAILED with exit code $code"; failed=1 ;;
    esac
    summary+=("$(printf '%-14s %5d s  %s' "$name" $((SECONDS - begun)) "$outcome")")
}
# measure NAME SECONDS ARGUMENTS...: a comparison, which ends by itself a little before its time and saves what it has.
measure() {
    local name=$1 seconds=$2
    shift 2
    step "$name" $((seconds + 30)) "$python" bench/side_by_side.py "$@" "${common[@]}" --seconds $((seconds * patience))
}

kernel_tests=tests/banded/test_triton_networks.py
step tests 90 "$python" -m pytest -q -m gpu tests/test_gpu.py \
    $kernel_tests::test_the_transformer_predicts_the_same $kernel_tests::test_the_decoder_gives_the_same_rows
measure denoise 220 denoise --model sana-1.6b-4k --sizes $large --modes $ways$kernels --repeats 2
measure decode 160 decode --sizes $large --modes whole$tiled,rows$kernels --repeats 2
measure curve 65 decode --sizes $sizes --modes rows
measure large-denoise 50 denoise --model sana-1.6b-4k --sizes $larger --modes rows
measure large-decode 60 decode --sizes $larger --modes rows
if [ -n "$folder" ]; then
    measure generate 240 generate --model "$folder" --sizes $large --modes whole$tiled,rows --steps $generate_steps
fi
if [ $memory = yes ]; then
    if [ $miniature = yes ]; then
        step memory 300 "$python" bench/gpu_memory.py --miniature --quick --scratch "$scratch"
    elif [ -n "$folder" ]; then
        step memory 600 "$python" bench/gpu_memory.py "$folder" --scratch "$scratch" --save
    else
        echo "error: --memory needs a checkpoint folder" >&2
        failed=1
    fi
fi

echo "== summary, $SECONDS s in all, results in $results" >&2
printf '%s\n' "${summary[@]+"${summary[@]}"}" >&2
exit $failed
