#!/usr/bin/env bash
# Makes data/smollm2_135m.saap: partitions of all 30 layers and 3 KV heads of
# SmolLM2-135M, 256 cells each, from 57 texts and one held out.
#
#   contrib/train_model.sh FOLDER OUT.saap
#
# FOLDER is that of contrib/make_traces.sh (nine of its train/*.txt: the others
# are measured in docs/end-to-end.md), with many/*.txt of contrib/many_texts.sh in
# it. Traces of all layers, 0.5 GB each, are put into FOLDER/all. Takes three
# minutes with torch, a CUDA device and a build for it, else two hours on 2 cores.
# What is there is not made again.
set -euo pipefail
[ $# -eq 2 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
layers=$(seq -s, 0 29)
texts=("$1"/many/*.txt)
for name in handbook_f handbook_n kernel_networking kernel_process kjv_gen kjv_mat python_asyncio python_email python_zip; do
  texts+=("$1/train/$name.txt")
done
traces=()
mkdir -p "$1/all"
for text in "${texts[@]}"; do
  trace=$1/all/$(basename "$text" .txt).safetensors
  [ -e "$trace" ] || "$root/build/venv/bin/python" "$root/contrib/export_trace.py" \
    --text "$text" --tokens 8192 --layers "$layers" --out "$trace"
  traces+=("$trace")
done
device=cpu # unless the build and the machine have CUDA
! { command -v nvidia-smi && grep -q '^FAISS_SAAP_CUDA:[A-Z]*=ON' "$root/build/CMakeCache.txt"; } >/dev/null || device=cuda
# Narrow classifiers: 8 MB for the whole model. A residual block
# and an input matrix for each head were the defaults when the file in data/ was made.
"$root/build/bin/train_partitions" --trace "${traces[@]}" --layers "$layers" --ncell 256 --width 48 --depth 1 --separate-inputs \
  --window 512 --device $device --resume --out "$2" --json "$2.json"
