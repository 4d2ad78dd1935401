#!/usr/bin/env bash
# What is worth knowing of a machine with a GPU, in less than ten minutes: bash .github/gpu.sh
#
# It needs neither data nor network, and writes into a temporary folder only.  PYTHON says which interpreter (default:
# python).  It ends with tables in Markdown, and with an exit code other than 0 if a part has failed.
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
trap 'kill "$running"; exit 130' INT TERM
export TMPDIR="$tmp" PYTHONPYCACHEPREFIX="$tmp" XDG_CACHE_HOME="$tmp" TRITON_CACHE_DIR="$tmp" CUDA_CACHE_PATH="$tmp"
table="| | | seconds | images/s | peak memory MiB |
| --- | --- | --- | --- | --- |"
code=0

part() { # NAME SECONDS COMMAND...: runs it for so long at most, and adds a row to the table
    local name=$1 limit=$2 start=$SECONDS status=0 result
    shift 2
    echo "$name, $limit s at most" >&2
    timeout -k 5 "$limit" "$@" >"$tmp/$name.txt" 2>"$tmp/$name.err" &
    running=$!
    wait "$running" || status=$?
    local seconds=$((SECONDS - start))
    if [ $status != 0 ]; then
        code=1
        [ $status = 124 ] && result="out of time" || result="failed ($status)"
        tail -n 20 "$tmp/$name.txt" "$tmp/$name.err" >&2
        result="**$result**: $(last_line "$name") | $seconds | | |"
    elif [ -e "$tmp/$name/log.jsonl" ]; then
        result=$(last_epoch "$tmp/$name/log.jsonl" $seconds)
    elif [ "$name" = tests ]; then
        result="$(last_line tests) | $seconds | | |"
    else
        result="below | $seconds | | |"
    fi
    table+=$'\n'"| $name | $result"
}

last_line() { # NAME: what a part said last
    cat "$tmp/$1.txt" "$tmp/$1.err" | grep -v '^ *$' | tail -n 1 | tr '|' '/'
}

last_epoch() { # LOG SECONDS: the cells of a run's row
    "$python" - "$@" <<'END'
import json, sys
line = json.loads(open(sys.argv[1]).readlines()[-1])
name = next(name for name in ("top1", "AP", "mask_AP", "miou", "PQ") if name in line)
print(f"loss {line['loss']:.2f}, {name} {line[name]:.3f} | {sys.argv[2]} | {line['images_per_second']:.0f} | {line['memory_MiB']:.0f} |")
END
}

part tests 120 "$python" -m pytest -q -p no:cacheprovider -k on_a_gpu "$root"
part cls 45 "$python" "$root/train.py" --task cls --out "$tmp/cls"
for task in det inst sem pan; do # one epoch, of larger batches than usual: such small images wait for the CPU otherwise
    part $task 60 "$python" "$root/train.py" --task $task --epochs 1 --batch-size 32 --out "$tmp/$task"
done
part benchmark 45 "$python" "$root/.github/benchmark.py" --task cls --image-size 224 --batch-size 128
part benchmark_inst 45 "$python" "$root/.github/benchmark.py" --task inst --image-size 1024 --batch-size 2
part benchmark_compiled $((585 - SECONDS)) "$python" "$root/.github/benchmark.py" --image-size 224 --batch-size 128 --compile

printf '\n%s\n' "$table"
for name in benchmark benchmark_inst benchmark_compiled; do
    printf '\n'
    cat "$tmp/$name.txt"
done
exit $code
