#!/usr/bin/env bash
# Packs the device tests and programs with the libraries they need, for a
# machine that has a GPU but no development packages.
#
#   tests/gpu/run_on_device.sh pack BUILD OUT.tar.xz   here
#   tests/gpu/run_on_device.sh unpack IN.tar.xz DIR    there; then run
#                                                      DIR/run PROGRAM [ARGUMENTS]
set -euo pipefail
shopt -s nullglob

case "${1:-}" in
  pack)
    build=$2
    out=$3
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir "$work/bin" "$work/lib"
    for program in "$build"/bin/*; do
      if [ -f "$program" ] && [ -x "$program" ]; then strip -o "$work/bin/$(basename "$program")" "$program"; fi
    done
    for f in "$build"/lib/*.so*; do
      [ ! -f "$f" ] || strip -o "$work/lib/$(basename "$f")" "$f"
    done
    # All but the C and C++ runtimes, which every machine has, and cuBLAS, half a
    # gigabyte that comes with the toolkit.
    ldd "$work"/bin/* "$work"/lib/* 2>/dev/null | awk '$3 ~ /^\// {print $3}' | sort -u |
      grep -Ev '/lib(cublas|cublasLt|c|m|stdc\+\+|gcc_s|dl|pthread|rt)\.so' |
      while read -r library; do cp -L "$library" "$work/lib/"; done
    cat >"$work/run" <<'RUN'
#!/usr/bin/env bash
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LD_LIBRARY_PATH=$here/lib:${LD_LIBRARY_PATH:-}:/usr/local/cuda/lib64
program=$1
shift
exec "$here/bin/$program" "$@"
RUN
    chmod +x "$work/run"
    tar -C "$work" -cJf "$out" .
    ;;
  unpack)
    mkdir -p "$3"
    tar -C "$3" -xJf "$2"
    ;;
  *)
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    exit 1
    ;;
esac
