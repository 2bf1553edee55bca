#!/usr/bin/env bash
# Makes the traces behind the figures in docs/recall.md: four genres of Debian's
# own texts, 8,192 tokens each, three of them also at 32,768.
#
#   contrib/make_traces.sh FOLDER
#
# Needs root for apt-get, the environment that ./run.sh sets up, and about 35
# minutes on 2 cores. What is there already is not made again.
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
cd "$1"

# Text versions that the documented figures were made with:
# bible-kjv 4.38, debian-handbook 11.20220922, html2text 1.3.2a-28,
# libpython3.11-stdlib 3.11.2-6+deb12u6, linux-doc-6.1 6.1.192-2.
[ -e kjv.txt ] && [ -e handbook.txt ] ||
  apt-get install -y bible-kjv bible-kjv-text debian-handbook html2text
[ -e kjv.txt ] || bible -f '1sam1:1-2sam24:25' | sed 's/^[^ ]* //' >kjv.txt
# The sections in alphabetical order, without the navigation at both ends.
[ -e handbook.txt ] ||
  for page in /usr/share/doc/debian-handbook/html/en-US/sect.[a-e]*.html; do
    html2text -width 100000 -nobs -utf8 "$page" | sed '1,/^    \* Next/d' | sed '/^    \* Prev/,$d'
  done >handbook.txt
[ -e python.txt ] || cat /usr/lib/python3.11/argparse.py /usr/lib/python3.11/tarfile.py >python.txt
if [ ! -e kernel.txt ]; then
  apt-get download linux-doc-6.1
  dpkg-deb -x linux-doc-6.1_*.deb linux-doc
  zcat -f linux-doc/usr/share/doc/linux-doc-6.1/Documentation/admin-guide/mm/[a-n]*.rst* >kernel.txt
fi

export_trace() { # text tokens scale name
  [ -e "$4.safetensors" ] || "$root/build/venv/bin/python" "$root/contrib/export_trace.py" \
    --text "$1.txt" --tokens "$2" --rope-scale "$3" --layers 9,15,21 --kv-heads 0 --out "$4.safetensors"
}
for text in kjv handbook python kernel; do
  export_trace $text 8192 1 ${text}_8k
done
for text in kjv handbook python; do
  export_trace $text 32768 4 ${text}_32k
done
