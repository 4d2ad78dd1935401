#!/usr/bin/env bash
# What is worth knowing of a machine with a GPU, in less than ten minutes: bash .github/gpu.sh
#
# It needs neither data nor network, and writes into a temporary folder only.  PYTHON says which interpreter (default:
# python).  It prints tables in Markdown, a row as soon as it is known, and exits with 1 if a part has failed.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
"$python" - <<'END' || exit 1
import os, sys, torch
print(f"torch {torch.__version__}", flush=True)
if not torch.cuda.is_available():
    sys.exit("there is no GPU here that torch can use")
print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {os.cpu_count()} CPU cores", flush=True)
END

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'kill $(jobs -p); exit 130' INT TERM
export TMPDIR="$tmp" PYTHONPYCACHEPREFIX="$tmp" XDG_CACHE_HOME="$tmp" TRITON_CACHE_DIR="$tmp" CUDA_CACHE_PATH="$tmp"
declare -A job
code=0

begin() { # NAME SECONDS COMMAND...: starts a part that runs for so long at most
    local name=$1 limit=$2
    shift 2
    echo "$name, $limit s at most" >&2
    timeout -k 5 "$limit" "$@" >"$tmp/$name.txt" 2>"$tmp/$name.err" &
    job[$name]=$!
}

finish() { # NAME: waits for a part, and prints its row of the table, or what it printed
    local name=$1 status=0
    wait "${job[$name]}" || status=$?
    if [ $status != 0 ]; then
        code=1
        [ $status = 124 ] && echo "| $name | **out of time** | | |" || echo "| $name | **failed ($status)** | | |"
        tail -n 20 "$tmp/$name.txt" "$tmp/$name.err" >&2
    elif [ -e "$tmp/$name/log.jsonl" ]; then
        echo "| $name | $(last_epoch "$tmp/$name/log.jsonl") |"
    elif [ "$name" = tests ]; then
        echo "| tests | $(last_line tests) | | |"
    else
        printf '\n%s\n\n' "$name"
        cat "$tmp/$name.txt"
    fi
}

last_line() { # NAME: what a part said last
    cat "$tmp/$1.txt" "$tmp/$1.err" | grep -v '^ *$' | tail -n 1 | tr '|' '/'
}

last_epoch() { # LOG: the cells of a run's row
    "$python" - "$@" <<'END'
import json, sys
line = json.loads(open(sys.argv[1]).readlines()[-1])
name = next(name for name in ("top1", "AP", "mask_AP", "miou", "PQ") if name in line)
print(f"loss {line['loss']:.2f}, {name} {line[name]:.3f} | {line['images_per_second']:.0f} | {line['memory_MiB']:.0f}")
END
}

echo "| | | images/s | peak memory MiB |"
echo "| --- | --- | --- | --- |"
begin tests 120 "$python" -m pytest -q -p no:cacheprovider -k on_a_gpu "$root"
finish tests
begin cls 60 "$python" "$root/train.py" --task cls --epochs 2 --out "$tmp/cls"
finish cls
# Side by side: such small images leave a GPU idle most of the time, and each run needs a core.
for task in det inst sem pan; do
    begin $task 150 "$python" "$root/train.py" --task $task --epochs 1 --batch-size 32 --workers 2 --out "$tmp/$task"
done
for task in det inst sem pan; do
    finish $task
done
begin benchmark 60 "$python" "$root/.github/benchmark.py" --task cls --image-size 224 --batch-size 128
finish benchmark
begin benchmark_inst 60 "$python" "$root/.github/benchmark.py" --task inst --image-size 1024 --batch-size 2
finish benchmark_inst
begin compiled $(((585 - SECONDS) / 2)) "$python" "$root/.github/benchmark.py" --image-size 224 --batch-size 128 --compile
finish compiled
begin cuda_graphs $((590 - SECONDS)) "$python" "$root/.github/benchmark.py" --image-size 224 --batch-size 128 --compile reduce-overhead
finish cuda_graphs
exit $code
