#!/usr/bin/env bash
# Runs all that needs a GPU and writes one report.
#
#   tests/gpu/run_on_device.sh report DIR OUT.md [TRACE...]
#       DIR is a build folder, or what `unpack` made. Every test, example and
#       demo; compute-sanitizer's memcheck and racecheck on the small cases;
#       attention against torch's, where python3 has torch; recall on the
#       embedded trace and the given ones. Fails when anything does. What the
#       programs print is kept in the folder FAISS_SAAP_LOGS where it is set;
#       each may take FAISS_SAAP_TIMEOUT seconds (900).
#
# For a machine that has a GPU but no development packages:
#
#   tests/gpu/run_on_device.sh pack BUILD OUT.tar.xz [PROGRAM...]
#       here: these programs (all of BUILD/bin), and the libraries they need
#   tests/gpu/run_on_device.sh unpack IN.tar.xz DIR
#       there; then `report`, or DIR/run PROGRAM [ARGUMENTS]
set -euo pipefail
shopt -s nullglob
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# The small cases: what compute-sanitizer makes a hundred times slower.
MEMCHECK='*GpuAdapterCases*/?:*GpuAdapterCases*/14:*GpuAdapterCases*/16:*GpuAdapterCases*/2?:*GpuAdapterCases*/3?:*GpuAdapterCases*/4?:*GpuAdapterCases*/5?:GpuAdapter.Faults*:GpuAdapter.Merges*:GpuAdapter.Truncated*:GpuAdapter.ABatch*:*GpuAdapterAhead*cells24sequences1:*GpuAdapterAhead*cells600sequences1'
MEMCHECK+=':*GpuAdapterWindows.AStepThat*:GpuTraining.FirstStep*:GpuAdapterRefusals.*:CApi.*:*GpuIndexCases*/?:GpuIndex.Removes*:GpuIndex.Reconstructs*'
MEMCHECK+=':GpuSequencePartitions.*:GpuKMeans.Equal*:GpuMergeStates.*:*GpuSelectK.EqualsTheHost/1:*GpuAssignCells*/?'
RACECHECK='*GpuAdapterCases*/0:*GpuAdapterCases*/46:*GpuAdapterCases*/48:*GpuAdapterCases*/2:*GpuAdapterCases*/14:*GpuAdapterCases*/16:*GpuAdapterCases*/17:*GpuAdapterCases*/22:*GpuAdapterCases*/33:*GpuAdapterCases*/36:*GpuAdapterCases*/40:*GpuAdapterCases*/43:*GpuAdapterCases*/51:*GpuAdapterCases*/57:GpuAdapter.Merges*'
RACECHECK+=':*GpuAdapterWindows.AStepThatIsRefused*:*GpuAdapterWindows.AStepThatReads*/1:*GpuIndexCases*/0:*GpuIndexCases*/13:GpuKMeans.Equal*:*GpuSelectK.EqualsTheHost/1:*GpuAssignCells*/2'

pack() { # build out [program...]
  local build=$1 out=$2 program f
  shift 2
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  mkdir "$work/bin" "$work/lib" "$work/data" "$work/contrib"
  [ $# -gt 0 ] || set -- $(cd "$build/bin" && echo *)
  for program in "$@"; do
    f=$build/bin/$program
    if [ -f "$f" ] && [ -x "$f" ]; then strip -o "$work/bin/$program" "$f"; fi
  done
  for f in "$build"/lib/*.so*; do
    [ ! -f "$f" ] || strip -o "$work/lib/$(basename "$f")" "$f"
  done
  # All but the C and C++ runtimes, which every machine has, and cuBLAS, half a
  # gigabyte that comes with the toolkit.
  ldd "$work"/bin/* "$work"/lib/* 2>/dev/null | awk '$3 ~ /^\// {print $3}' | sort -u |
    grep -Ev '/lib(cublas|cublasLt|c|m|stdc\+\+|gcc_s|dl|pthread|rt)\.so' |
    while read -r f; do cp -L "$f" "$work/lib/"; done
  cp "$root/data/kjv_8k.safetensors" "$work/data/"
  cp "$root/contrib/c_api.py" "$root/contrib/check_sdpa.py" "$work/contrib/"
  describe_build "$build" >"$work/build.txt"
  cat >"$work/run" <<'RUN'
#!/usr/bin/env bash
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LD_LIBRARY_PATH=$here/lib:${LD_LIBRARY_PATH:-}:/usr/local/cuda/lib64
program=$1
shift
exec "$here/bin/$program" "$@"
RUN
  chmod +x "$work/run"
  # Programs share most of their code: a dictionary that has it.
  tar -C "$work" -c . | xz -9 >"$out"
}

describe_build() { # build folder or unpacked folder
  if [ -f "$1/build.txt" ]; then
    cat "$1/build.txt"
    return
  fi
  local of=() changed=
  [ -z "$(git -C "$root" status --porcelain 2>/dev/null)" ] || changed=' with changes'
  of+=("commit $(git -C "$root" rev-parse --short=12 HEAD 2>/dev/null || echo unknown)$changed")
  if [ -f "$1/CMakeCache.txt" ]; then
    of+=("CUDA $("$(sed -n 's/^CMAKE_CUDA_COMPILER:[^=]*=//p' "$1/CMakeCache.txt")" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')")
    of+=("architectures $(sed -n 's/^CMAKE_CUDA_ARCHITECTURES:[^=]*=//p' "$1/CMakeCache.txt")")
  fi
  local IFS=';'
  echo "${of[*]}" | sed 's/;/, /g'
}

failures=0
# Runs a command, keeps its output in a log, and prints a row of a table.
row() { # name log command...
  local name=$1 log=$2 begin=$EPOCHREALTIME status=0 outcome
  shift 2
  timeout "${FAISS_SAAP_TIMEOUT:-900}" "$@" >"$log" 2>&1 || status=$?
  if grep -q '^\[==========\]' "$log"; then
    local count
    count() { grep -c "^\[ *$1 *\] .*(.* ms)" "$log" || true; }
    outcome="$(count OK) passed, $(count FAILED) failed, $(count SKIPPED) skipped"
    ! grep -q 'SUMMARY' "$log" || outcome+="; $(grep -ho '[A-Z]* SUMMARY: .*' "$log" | tail -n 1)"
  else
    outcome='done'
  fi
  if [ $status != 0 ]; then
    outcome="**exit status $status**, $outcome"
    touch "$log.failed"
  fi
  printf '| %s | %s | %.1f |\n' "$name" "$outcome" \
    "$(awk "BEGIN {print $EPOCHREALTIME - $begin}")"
  return $status
}

device_state() {
  nvidia-smi --format=csv,noheader \
    --query-gpu=name,compute_cap,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.draw \
    2>/dev/null | head -n 1
}

report() { # folder out [trace...]
  local dir out=$2 tool program trace log
  dir=$(cd "$1" && pwd)
  shift 2
  local data=$dir/data/kjv_8k.safetensors contrib=$dir/contrib
  [ -e "$data" ] || data=$root/data/kjv_8k.safetensors
  [ -e "$contrib" ] || contrib=$root/contrib
  logs=${FAISS_SAAP_LOGS:-}
  if [ -n "$logs" ]; then
    mkdir -p "$logs"
  else
    logs=$(mktemp -d)
    trap 'rm -rf "$logs"' EXIT
  fi
  export LD_LIBRARY_PATH=$dir/lib:${LD_LIBRARY_PATH:-}:/usr/local/cuda/lib64 FAISS_SAAP_TRACE=$data
  local header='| | outcome | s |
|---|---|---|'
  local before after
  before=$(device_state) || { before='no device'; failures=1; }

  rm -f "$logs"/*.rows "$logs"/*.failed
  # Alone: one of the tests fills the device's memory.
  local rows=$logs/programs.rows
  for program in faiss_saap_gpu_tests faiss_saap_raft_tests gpu_example gpu_index_example; do
    [ -x "$dir/bin/$program" ] || continue
    row "\`$program\`" "$logs/$program.log" "$dir/bin/$program" >>"$rows" || failures=$((failures + 1))
  done
  for trace in "$@"; do
    log=$logs/trace_$(basename "$trace").log
    FAISS_SAAP_TRACE=$trace row "recall on \`$(basename "$trace")\`" "$log" \
      "$dir/bin/faiss_saap_gpu_tests" --gtest_filter='GpuTrace.*' >>"$rows" || failures=$((failures + 1))
  done
  after=$(device_state) || after='no device'

  # These share the device.
  local sanitizer jobs=() shards=1 i
  sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
  [ "$(nproc)" -lt 8 ] || shards=4
  if [ -x "$sanitizer" ]; then
    for tool in memcheck racecheck; do
      local filter=$MEMCHECK options=(--leak-check full) fewer=()
      [ $tool = memcheck ] || { filter=$RACECHECK options=() fewer=(env FAISS_SAAP_STEPS=1); }
      for ((i = 0; i < shards; i++)); do
        log=$logs/$tool.$i
        OMP_NUM_THREADS=2 GTEST_TOTAL_SHARDS=$shards GTEST_SHARD_INDEX=$i row "$tool, part $((i + 1)) of $shards" "$log.log" \
          "${fewer[@]}" "$sanitizer" --tool $tool "${options[@]}" --error-exitcode 9 \
          "$dir/bin/faiss_saap_gpu_tests" --gtest_filter="$filter" >"$log.rows" &
        jobs+=($!)
      done
    done
  fi
  if [ -x "$dir/bin/demo" ]; then
    row '`demo`' "$logs/demo.log" "$dir/bin/demo" --trace "$data" >"$logs/demo.rows" &
    jobs+=($!)
  fi
  if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    row '`check_sdpa.py`' "$logs/sdpa.log" python3 "$contrib/check_sdpa.py" \
      --library "$dir/lib/libfaiss_saap_c.so" >"$logs/sdpa.rows" &
    jobs+=($!)
  fi
  for i in "${jobs[@]}"; do
    wait "$i" || failures=$((failures + 1))
  done

  block() { # log pattern
    echo '```'
    grep -hE "$2" "$1" || true
    echo '```'
  }
  {
    echo '# Tests on a device'
    echo
    echo "$(describe_build "$dir"), run on $(date -u '+%Y-%m-%d %H:%M UTC')."
    echo
    echo '| | name, compute capability, driver, memory, SM clock, its maximum, memory clock, power |'
    echo '|---|---|'
    echo "| before | $before |"
    echo "| after the tests | $after |"
    echo
    if [ $failures = 0 ]; then echo '**All passed.**'; else echo "**$failures failed.**"; fi
    echo
    echo '## Programs'
    echo
    echo "$header"
    cat "$rows" "$logs"/demo.rows
    echo
    echo '## compute-sanitizer on the small cases'
    echo
    if [ -x "$sanitizer" ]; then
      echo "At once, and beside the demo and torch: times are not of one alone."
      echo
      echo "$header"
      cat "$logs"/memcheck.*.rows "$logs"/racecheck.*.rows
    else
      echo 'Not run: there is no compute-sanitizer.'
    fi
    echo
    echo '## Attention with every cell, against torch'
    echo
    if [ -e "$logs/sdpa.rows" ]; then
      echo "$header"
      cat "$logs/sdpa.rows"
      echo
      block "$logs/sdpa.log" .
    else
      echo 'Not run: python3 has no torch that sees a device.'
    fi
    echo
    echo '## Recall on recorded texts, CPU and device'
    for log in "$logs/faiss_saap_gpu_tests.log" "$logs"/trace_*.log; do
      echo
      case "$log" in */trace_*) basename "$log" .log | sed 's/^trace_//' ;; *) basename "$data" ;; esac
      echo
      block "$log" '^layer '
    done
    if [ -e "$logs/demo.log" ]; then
      echo
      echo '## The demo says'
      echo
      block "$logs/demo.log" 'GPU'
    fi
    if [ $failures != 0 ]; then
      echo
      echo '## What failed'
      for log in "$logs"/*.failed; do
        log=${log%.failed}
        echo
        echo "$(basename "$log"):"
        echo
        echo '```'
        { grep -E -A 12 ': Failure|^=========.*(rror|Invalid|hazard|Race)|^rror' "$log" || tail -n 20 "$log"; } | head -n 120
        echo '```'
      done
    fi
  } >"$out"
  echo "$out: $([ $failures = 0 ] && echo 'all passed' || echo "$failures failed")"
  [ $failures = 0 ]
}

case "${1:-}" in
  pack | report)
    [ $# -ge 3 ] || { "$0"; exit 2; }
    "$@"
    ;;
  unpack)
    mkdir -p "$3"
    tar -C "$3" -xJf "$2"
    ;;
  *)
    sed -n '2,19s/^# \{0,1\}//p' "$0"
    exit 1
    ;;
esac
