#!/usr/bin/env bash
# Makes the traces behind the figures in docs/recall.md and docs/classifier.md:
# four genres of Debian's own texts, 8,192 tokens each, three of them also at
# 32,768, and in FOLDER/train other passages to train on, at both lengths; in
# FOLDER/heads those of the benchmark of methods, with two genres more.
#
#   contrib/make_traces.sh FOLDER
#   contrib/make_traces.sh --bench 8k|32k FOLDER   only those of ./run.sh bench
#
# Needs root for apt-get, the environment that ./run.sh sets up, and about 3
# hours on 2 cores, two of them for the long traces to train on, which come
# last: with torch and CUDA, 30 s each. What is there is not made again.
set -euo pipefail
bench=
if [ "${1:-}" = --bench ] && [ $# -eq 3 ]; then
  bench=$2
  shift 2
fi
[ $# -eq 1 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
cd "$1"

# Text versions that the documented figures were made with:
# bible-kjv 4.38, debian-handbook 11.20220922, html2text 1.3.2a-28,
# jargon-text 4.4.7-4.1, libpython3.11-stdlib 3.11.2-6+deb12u6,
# libstdc++-12-dev 12.2.0-14+deb12u1, linux-doc-6.1 6.1.192-2.
if [ ! -d /usr/lib/python3.11 ] && [ ! -e python.txt ]; then
  echo "error: the texts are made of packages of Debian 12; elsewhere put texts of your own into $PWD under the same names" >&2
  exit 1
fi
[ -e kjv.txt ] && [ -e handbook.txt ] ||
  apt-get install -y bible-kjv bible-kjv-text debian-handbook html2text
[ -e kjv.txt ] || bible -f '1sam1:1-2sam24:25' | sed 's/^[^ ]* //' >kjv.txt
# Sections of the handbook in alphabetical order, without the navigation at both
# ends.
handbook() { # first letters
  for page in /usr/share/doc/debian-handbook/html/en-US/sect.[$1]*.html; do
    html2text -width 100000 -nobs -utf8 "$page" | sed '1,/^    \* Next/d' | sed '/^    \* Prev/,$d'
  done
}
[ -e handbook.txt ] || handbook a-e >handbook.txt
[ -e python.txt ] || cat /usr/lib/python3.11/argparse.py /usr/lib/python3.11/tarfile.py >python.txt
if [ ! -e kernel.txt ] || [ ! -e train/kernel_locking.txt ]; then
  apt-get download linux-doc-6.1
  dpkg-deb -x linux-doc-6.1_*.deb linux-doc
  zcat -f linux-doc/usr/share/doc/linux-doc-6.1/Documentation/admin-guide/mm/[a-n]*.rst* >kernel.txt
fi
# A glossary, from its first entry on, and C++ headers.
[ -e jargon.txt ] || { apt-get download jargon-text && dpkg-deb -x jargon-text_*.deb jargon; }
[ -e jargon.txt ] || zcat jargon/usr/share/doc/jargon-text/jargon.txt.gz | sed -n '/^   :/,$p' >jargon.txt
[ -e headers.txt ] || cat /usr/include/c++/12/bits/stl_[a-m]*.h >headers.txt

# Every fourth layer, all KV heads, for the benchmark of methods.
bench_traces() { # tokens scale name texts...
  local tokens=$1 scale=$2 name=$3 text
  shift 3
  mkdir -p heads
  for text in "$@"; do
    [ -e "heads/${text}_$name.safetensors" ] || "$root/build/venv/bin/python" "$root/contrib/export_trace.py" \
      --text $text.txt --tokens "$tokens" --rope-scale "$scale" --layers 1,5,9,13,17,21,25,29 --kv-heads 0,1,2 \
      --out "heads/${text}_$name.safetensors"
  done
}
bench_8k() { bench_traces 8192 1 8k kjv handbook python kernel jargon headers; }
bench_32k() { bench_traces 32768 4 32k handbook; }
export_trace() { # text tokens scale name
  [ -e "$4.safetensors" ] || "$root/build/venv/bin/python" "$root/contrib/export_trace.py" \
    --text "$1.txt" --tokens "$2" --rope-scale "$3" --layers 9,15,21 --kv-heads 0 --out "$4.safetensors"
}
case "$bench" in
  '') ;;
  8k)
    bench_8k
    exit
    ;;
  32k)
    bench_32k
    exit
    ;;
  *)
    echo "error: --bench $bench: there are 8k and 32k" >&2
    exit 2
    ;;
esac

mkdir -p train
verses() { bible -f "$1" | sed 's/^[^ ]* //'; }
[ -e train/kjv_gen.txt ] || verses 'gen1:1-exo40:38' >train/kjv_gen.txt
[ -e train/kjv_mat.txt ] || verses 'mat1:1-joh21:25' >train/kjv_mat.txt
[ -e train/kjv_psa.txt ] || verses 'psa1:1-pro31:31' >train/kjv_psa.txt
[ -e train/handbook_f.txt ] || handbook f-m >train/handbook_f.txt
[ -e train/handbook_n.txt ] || handbook n-z >train/handbook_n.txt
python=/usr/lib/python3.11
[ -e train/python_asyncio.txt ] || cat $python/asyncio/[b-s]*.py >train/python_asyncio.txt
[ -e train/python_email.txt ] || cat $python/email/*.py >train/python_email.txt
[ -e train/python_typing.txt ] || cat $python/{typing,inspect,dataclasses}.py >train/python_typing.txt
[ -e train/python_zip.txt ] || cat $python/{zipfile,subprocess,shutil,socket}.py >train/python_zip.txt
kernel=linux-doc/usr/share/doc/linux-doc-6.1/Documentation
if [ ! -e train/kernel_locking.txt ]; then
  zcat -f $kernel/filesystems/[a-z]*.rst* >train/kernel_filesystems.txt
  zcat -f $kernel/networking/[a-z]*.rst* >train/kernel_networking.txt
  zcat -f $kernel/process/*.rst* >train/kernel_process.txt
  zcat -f $kernel/{RCU,locking}/*.rst* >train/kernel_locking.txt
fi

bench_8k
for text in kjv handbook python kernel; do
  export_trace $text 8192 1 ${text}_8k
done
for text in kjv handbook python; do
  export_trace $text 32768 4 ${text}_32k
done
bench_32k
for text in train/*.txt; do
  export_trace "${text%.txt}" 8192 1 "${text%.txt}_8k"
done
for text in train/*.txt; do
  export_trace "${text%.txt}" 32768 4 "${text%.txt}_32k"
done
