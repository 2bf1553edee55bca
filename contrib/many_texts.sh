#!/usr/bin/env bash
# Makes texts to train on: about fifty passages of as many genres as Debian's
# packages have, each of 32,768 tokens and more (docs/classifier.md).
#
#   contrib/many_texts.sh FOLDER
#
# Writes FOLDER/NAME.txt; packages are downloaded and unpacked in
# FOLDER/packages, not installed. What is there is not made again. None of it is
# among the texts that contrib/make_traces.sh makes to measure on: other books of
# the Bible, other parts of the kernel's documentation, other projects' headers.
# Needs apt-get, html2text and nroff (Debian: groff-base).
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
for tool in apt-get html2text nroff; do
  command -v $tool >/dev/null || { echo "error: $tool is missing" >&2; exit 1; }
done
mkdir -p "$1/packages"
cd "$1"
BYTES=260000 # 32,768 tokens are 90,000 of code to 150,000 of prose

# name, package, what its files are, and which: patterns within the package, in
# the order of the shell
TEXTS='
anarchism_1     anarchism               html  usr/share/doc/anarchism/html/sec[A-C]*
anarchism_2     anarchism               html  usr/share/doc/anarchism/html/sec[H-J]*
apache          apache2-doc             html  usr/share/doc/apache2-doc/manual/en/[a-m]*.html
apache_modules  apache2-doc             html  usr/share/doc/apache2-doc/manual/en/mod/mod_[p-s]*.html
boost_asio      libboost1.74-dev        text  usr/include/boost/asio/[b-d]*.hpp
boost_container libboost1.74-dev        text  usr/include/boost/container/*.hpp
boost_graph     libboost1.74-dev        text  usr/include/boost/graph/[a-d]*.hpp
debian_faq      debian-faq              html  usr/share/doc/debian/FAQ/*.en.html
debian_policy   debian-policy           text  usr/share/doc/debian-policy/policy.txt.gz
debian_ref      debian-reference-en     html  usr/share/debian-reference/ch0[2-9].en.html
developers_ref  developers-reference    html  usr/share/developers-reference/*.html
devil           dict-devil              dict  usr/share/dictd/devil.dict.dz
django_db       python3-django          text  usr/lib/python3/dist-packages/django/db/models/*.py
django_forms    python3-django          text  usr/lib/python3/dist-packages/django/[f-h]*/*.py
eigen           libeigen3-dev           text  usr/include/eigen3/Eigen/src/Core/[A-D]*.h
eigen_sparse    libeigen3-dev           text  usr/include/eigen3/Eigen/src/Sparse*/*.h
elisp           emacs-el                text  usr/share/emacs/28.2/lisp/[d-f]*.el.gz
fortunes        fortunes                plain usr/share/games/fortunes/[a-z]*
gcide           dict-gcide              dict  usr/share/dictd/gcide.dict.dz
git             git-doc                 text  usr/share/doc/git-doc/git-[a-d]*.txt
git_technical   git-doc                 text  usr/share/doc/git-doc/[r-u]*.txt usr/share/doc/git-doc/technical/*.txt
go_net          golang-1.19-src         text  usr/share/go-1.19/src/net/http/[c-s]*.go
go_types        golang-1.19-src         text  usr/share/go-1.19/src/go/types/[a-e]*.go
kernel_bpf      linux-doc-6.1           text  usr/share/doc/linux-doc-6.1/Documentation/bpf/*.rst*
kernel_core     linux-doc-6.1           text  usr/share/doc/linux-doc-6.1/Documentation/core-api/*.rst*
kernel_driver   linux-doc-6.1           text  usr/share/doc/linux-doc-6.1/Documentation/driver-api/[a-p]*.rst*
kernel_gpu      linux-doc-6.1           text  usr/share/doc/linux-doc-6.1/Documentation/gpu/*.rst*
kernel_trace    linux-doc-6.1           text  usr/share/doc/linux-doc-6.1/Documentation/trace/*.rst*
kernel_x86      linux-doc-6.1           text  usr/share/doc/linux-doc-6.1/Documentation/x86/*.rst*
linux_uapi      linux-libc-dev          text  usr/include/linux/[a-i]*.h
manual_files    manpages                man   usr/share/man/man[57]/[a-r]*
manual_calls    manpages-dev            man   usr/share/man/man2/[a-m]*
manual_library  manpages-dev            man   usr/share/man/man3/[f-p]*
octave          octave-doc              html  usr/share/doc/octave/octave.html/[A-M]*.html
openssl         libssl-doc              man   usr/share/man/man3/[D-R]*
perl            perl-doc                text  usr/share/perl/5.36.0/pod/perl[e-o]*.pod
perl_modules    perl-modules-5.36       text  usr/share/perl/5.36.0/[A-F]*.pm
postgres        postgresql-doc-15       html  usr/share/doc/postgresql-doc-15/html/sql-[a-c]*.html
postgres_server postgresql-doc-15       html  usr/share/doc/postgresql-doc-15/html/runtime-*.html
python_howto    python3.11-doc          text  usr/share/doc/python3.11/html/_sources/howto/*.txt
python_library  python3.11-doc          text  usr/share/doc/python3.11/html/_sources/library/[a-f]*.txt
python_news     python3.11-doc          text  usr/share/doc/python3.11/html/_sources/whatsnew/3*.txt
ruby            libruby3.1              text  usr/lib/ruby/3.1.0/*.rb
sqlite          sqlite3-doc             html  usr/share/doc/sqlite3/[a-f]*.html
sympy           python3-sympy           text  usr/lib/python3/dist-packages/sympy/core/*.py
sympy_solvers   python3-sympy           text  usr/lib/python3/dist-packages/sympy/solvers/*.py
vera            dict-vera               dict  usr/share/dictd/vera.dict.dz
vim             vim-doc                 html  usr/share/doc/vim/html/[c-o]*.html
wordnet         dict-wn                 dict  usr/share/dictd/wn.dict.dz
'

unpacked() { # package
  [ -d "packages/$1" ] || {
    (cd packages && apt-get download -q "$1" >&2)
    dpkg-deb -x packages/"$1"_*.deb "packages/$1.part"
    mv "packages/$1.part" "packages/$1"
    rm packages/"$1"_*.deb
  }
}

plain_text() { # kind files...
  local kind=$1 file
  shift
  for file in "$@"; do
    [ -f "$file" ] || continue
    case $kind in
      text) zcat -f "$file" ;;
      plain) case "$file" in *.dat | *.u8) ;; *) cat "$file" ;; esac ;;
      html) html2text -width 100 -nobs -utf8 "$file" ;;
      man) zcat -f "$file" | nroff -man -Tutf8 -c -rLL=100n 2>/dev/null | col -bx ;;
      dict) zcat -f <"$file" ;;
    esac
  done
}

# What is read of a package. Dictionaries are read from within the letter A on,
# behind their own description.
passage() ( # package kind patterns...
  set +o pipefail # head ends early
  local package=$1 kind=$2 begin=1
  shift 2
  [ "$kind" != dict ] || begin=100001
  cd "packages/$package"
  # shellcheck disable=SC2068
  plain_text "$kind" $@ 2>/dev/null | tail -c +$begin | head -c $BYTES | iconv -c -f utf-8 -t utf-8
)

echo "$TEXTS" | while read -r name package kind patterns; do
  [ -n "$name" ] && [ ! -e "$name.txt" ] || continue
  unpacked "$package"
  passage "$package" "$kind" "$patterns" >"$name.part"
  size=$(stat -c %s "$name.part")
  [ "$size" -ge 150000 ] || { echo "error: $name has only $size bytes" >&2; exit 1; }
  mv "$name.part" "$name.txt"
done
