#!/usr/bin/env bash
# Makes data/smollm2_135m.saap: partitions of all 30 layers and 3 KV heads of
# SmolLM2-135M, 256 cells each, from eight texts and one held out.
#
#   contrib/train_model.sh FOLDER OUT.saap
#
# FOLDER is that of contrib/make_traces.sh (its train/*.txt); traces of all
# layers, 0.5 GB each, are put into FOLDER/all. Takes half an hour on 2 cores.
# What is there is not made again.
set -euo pipefail
[ $# -eq 2 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
layers=$(seq -s, 0 29)
traces=()
mkdir -p "$1/all"
for text in handbook_f handbook_n kernel_networking kernel_process kjv_gen kjv_mat python_asyncio python_email python_zip; do
  trace=$1/all/$text.safetensors
  [ -e "$trace" ] || "$root/build/venv/bin/python" "$root/contrib/export_trace.py" \
    --text "$1/train/$text.txt" --tokens 8192 --layers "$layers" --out "$trace"
  traces+=("$trace")
done
# Narrow classifiers and bfloat16 centroids: 8 MB for the whole model.
"$root/build/bin/train_partitions" --trace "${traces[@]}" --layers "$layers" --ncell 256 --width 48 \
  --bf16-centroids --window 512 --steps 500 --resume --out "$2" --json "$2.json"
