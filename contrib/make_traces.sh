#!/usr/bin/env bash
# Makes the traces behind the figures in docs/recall.md and docs/classifier.md:
# Debian's own texts of four genres, 8,192 tokens each, of six at 32,768, and in
# FOLDER/train other passages to train on, at both lengths; in FOLDER/heads those
# of the benchmark of methods.
#
#   contrib/make_traces.sh FOLDER
#   contrib/make_traces.sh --bench 8k|32k FOLDER   only those of ./run.sh bench
#
# Needs Debian 12, root or sudo, the environment that ./run.sh sets up, and about 3
# hours on 2 cores: 5 to 9 minutes for each long trace, those to train on last,
# or 6 s with torch and CUDA. What is there is not made again, and no text is
# looked for whose traces are there.
set -euo pipefail
bench=
if [ "${1:-}" = --bench ] && [ $# -eq 3 ]; then
  bench=$2
  shift 2
fi
[ $# -eq 1 ] && [ "${1#-}" = "$1" ] || { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
cd "$1"

# Text versions that the documented figures were made with:
# bible-kjv 4.38, debian-handbook 11.20220922, html2text 1.3.2a-28,
# jargon-text 4.4.7-4.1, libpython3.11-stdlib 3.11.2-6+deb12u6,
# libstdc++-12-dev 12.2.0-14+deb12u1, linux-doc-6.1 6.1.192-2.
install_packages() {
  local root=
  [ "$(id -u)" = 0 ] || root=sudo
  $root apt-get install -y "$@" >&2
}
verses() { # from-to
  command -v bible >/dev/null || install_packages bible-kjv bible-kjv-text
  bible -f "$1" | sed 's/^[^ ]* //'
}
# Sections of the handbook in alphabetical order, without the navigation at both
# ends.
handbook() { # first letters
  command -v html2text >/dev/null && [ -d /usr/share/doc/debian-handbook ] ||
    install_packages debian-handbook html2text
  for page in /usr/share/doc/debian-handbook/html/en-US/sect.[$1]*.html; do
    html2text -width 100000 -nobs -utf8 "$page" | sed '1,/^    \* Next/d' | sed '/^    \* Prev/,$d'
  done
}
python_sources() { (cd /usr/lib/python3.11 && cat $*); } # patterns of files
unpacked() { # package: its files into the folder of its name
  [ -d "$1" ] || { apt-get download "$1" && dpkg-deb -x "$1"_*.deb "$1"; } >&2
}
kernel() { # patterns of pages of its documentation
  unpacked linux-doc-6.1
  local pages
  for pages in "$@"; do
    zcat -f linux-doc-6.1/usr/share/doc/linux-doc-6.1/Documentation/$pages.rst*
  done
}
# A glossary, from its first entry on.
jargon() {
  unpacked jargon-text
  zcat jargon-text/usr/share/doc/jargon-text/jargon.txt.gz | sed -n '/^   :/,$p'
}

make_text() {
  case "$1" in
    kjv) verses '1sam1:1-2sam24:25' ;;
    handbook) handbook a-e ;;
    python) python_sources argparse.py tarfile.py ;;
    kernel) kernel 'admin-guide/mm/*' ;;
    jargon) jargon ;;
    headers) cat /usr/include/c++/12/bits/stl_[a-m]*.h ;;
    train/kjv_gen) verses 'gen1:1-exo40:38' ;;
    train/kjv_mat) verses 'mat1:1-joh21:25' ;;
    train/kjv_psa) verses 'psa1:1-pro31:31' ;;
    train/handbook_f) handbook f-m ;;
    train/handbook_n) handbook n-z ;;
    train/python_asyncio) python_sources 'asyncio/[b-s]*.py' ;;
    train/python_email) python_sources 'email/*.py' ;;
    train/python_typing) python_sources typing.py inspect.py dataclasses.py ;;
    train/python_zip) python_sources zipfile.py subprocess.py shutil.py socket.py ;;
    train/kernel_filesystems) kernel 'filesystems/[a-z]*' ;;
    train/kernel_networking) kernel 'networking/[a-z]*' ;;
    train/kernel_process) kernel 'process/*' ;;
    train/kernel_locking) kernel 'RCU/*' 'locking/*' ;;
  esac
}
PASSAGES="kjv_gen kjv_mat kjv_psa handbook_f handbook_n python_asyncio python_email python_typing python_zip
  kernel_filesystems kernel_networking kernel_process kernel_locking"

export_trace() { # text tokens scale layers KV-heads trace
  [ ! -e "$6" ] || return 0
  if [ ! -e "$1.txt" ]; then
    [ -d /usr/lib/python3.11 ] || {
      echo "error: the texts are made of packages of Debian 12; elsewhere put a text of your own into $PWD/$1.txt" >&2
      exit 1
    }
    mkdir -p train
    make_text "$1" >"$1.part"
    mv "$1.part" "$1.txt"
  fi
  "$root/build/venv/bin/python" "$root/contrib/export_trace.py" --text "$1.txt" --tokens "$2" --rope-scale "$3" \
    --layers "$4" --kv-heads "$5" --out "$6"
}
# Every fourth layer, all KV heads, for the benchmark of methods.
bench_traces() { # tokens scale name texts...
  local tokens=$1 scale=$2 name=$3 text
  shift 3
  mkdir -p heads
  for text in "$@"; do
    export_trace "$text" "$tokens" "$scale" 1,5,9,13,17,21,25,29 0,1,2 "heads/${text}_$name.safetensors"
  done
}
# One KV head of three layers, for the other figures.
figure_traces() { # tokens scale name texts...
  local tokens=$1 scale=$2 name=$3 text
  shift 3
  for text in "$@"; do
    export_trace "$text" "$tokens" "$scale" 9,15,21 0 "${text}_$name.safetensors"
  done
}
bench_8k() { bench_traces 8192 1 8k kjv handbook python kernel jargon headers; }
bench_32k() { bench_traces 32768 4 32k handbook kernel jargon headers; }

case "$bench" in
  '')
    bench_8k
    figure_traces 8192 1 8k kjv handbook python kernel
    figure_traces 32768 4 32k kjv handbook python kernel jargon headers
    bench_32k
    # shellcheck disable=SC2086
    figure_traces 8192 1 8k $(printf 'train/%s ' $PASSAGES)
    # shellcheck disable=SC2086
    figure_traces 32768 4 32k $(printf 'train/%s ' $PASSAGES)
    ;;
  8k) bench_8k ;;
  32k) bench_32k ;;
  *)
    echo "error: --bench $bench: there are 8k and 32k" >&2
    exit 2
    ;;
esac
