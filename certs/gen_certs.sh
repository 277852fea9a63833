#!/usr/bin/env bash
# Makes the lab's certificates with the openssl command: a CA, a server and a client
# certificate, and a PFX of the client's. Works from any folder; all files land beside
# this script. It builds and verifies everything in a temporary folder first and only then
# moves it into place, so a run that fails or is interrupted changes nothing.
#
# Needs OpenSSL 1.1.1+ or LibreSSL 3.3+, and bash 3.2+ (what macOS has).
case ${BASH_VERSION:-} in '') echo 'gen_certs.sh: needs bash; run it with: bash certs/gen_certs.sh' >&2; exit 1 ;; esac
# Start anew with -p, so that nothing inherited (SHELLOPTS, BASH_ENV, exported functions) gives
# the commands below another meaning. To watch them: bash -xp certs/gen_certs.sh
# (POSIXLY_CORRECT: with it, not even exec or unset can be an inherited function.)
case $- in *p*) ;; *) POSIXLY_CORRECT=1; unset CDPATH GLOBIGNORE; exec "$BASH" -p "$0" "$@" ;; esac
unset POSIXLY_CORRECT
set -euo pipefail +o posix   # posix: where sh is a bash, as on macOS
umask 077   # private from the moment they exist: some openssls create keys readable by all
LC_ALL=C    # so that A-Z means these letters and no others, in every language and bash

usage() {
  cat <<'TEXT'
usage: bash certs/gen_certs.sh               make the CA, server's and client's
       bash certs/gen_certs.sh client NAME   make one more client's, CN = NAME
       bash certs/gen_certs.sh --help        print this

Without arguments it replaces the whole set, CA included. Password of the PFX:
asked for on a terminal, taken from MTLS_PFX_PASSWORD if that is set, else made
up and printed at the end.
TEXT
}

complain() { printf 'gen_certs.sh: %s\n' "$*" >&2; }
refuse() { complain "$@"; exit 2; }
fail() { complain "$@"; exit 1; }
unchanged='the certificates that were there are unchanged'

# --- What is asked for ---------------------------------------------------------------------

name=   # empty: the whole set
files=(ca.key ca.crt ca.srl server.key server.csr server.crt client.key client.csr client.crt client.pfx)
case $#:${1:-} in
  0:) ;;
  1:-h | 1:--help) usage; exit 0 ;;
  2:client)
    name=$2
    case $name in
      '' | [.-]* | *[!A-Za-z0-9._-]*)
        refuse "'$name' is not a valid NAME: letters, digits, '.', '_' and '-', the first no '.' or '-'" ;;
      [Cc][Aa] | [Ss][Ee][Rr][Vv][Ee][Rr] | [Cc][Ll][Ii][Ee][Nn][Tt])   # whatever the case: file systems may ignore it
        refuse "'$name' is of the whole set; choose another NAME" ;;
    esac
    [ "${#name}" -le 64 ] || refuse 'a NAME has at most 64 characters (the limit of a common name)'
    files=(ca.srl "$name.key" "$name.csr" "$name.crt" "$name.pfx") ;;
  *) usage >&2; refuse "cannot use these arguments: $*" ;;
esac

# In Git Bash, python3 is the Store's alias, and a Windows openssl cannot ask on mintty's terminal.
python=python3 can_ask=no
case $OSTYPE in
  msys* | cygwin*) python=python ;;
  *) if [ -t 0 ] && { : </dev/tty; } 2>/dev/null; then can_ask=yes; fi ;;
esac

certs=$(cd -- "$(dirname -- "$0")" && pwd -P)

# cannot DO FILE: says whose it is.
cannot() {
  local mode who
  read -r mode _ who _ < <(ls -ld "$2")
  fail "cannot $1 $2: it is $who's, $mode; use chown or chmod"
}

command -v openssl >/dev/null || fail 'the openssl command is missing; install OpenSSL 1.1.1+ or LibreSSL 3.3+'
version=$(openssl version) || fail 'the openssl command does not run; install OpenSSL 1.1.1+ or LibreSSL 3.3+'
case $version in
  'OpenSSL 0.'* | 'OpenSSL 1.0.'* | 'OpenSSL 1.1.0'* | 'LibreSSL '[0-2].* | 'LibreSSL 3.'[0-2].*)
    fail "$version is too old; install OpenSSL 1.1.1+ or LibreSSL 3.3+" ;;
esac

# --- One run at a time, nothing left behind ------------------------------------------------

# The kernel keeps this lock for as long as this process lives: a killed run cannot leave it
# behind, and two runs can never both hold it. macOS and Git Bash have no flock, but perl.
# (Whether Windows keeps a lock when the perl that took it has ended, nobody has tried.)
{ exec 9<>"$certs/gen_certs.sh"; } 2>/dev/null || cannot write "$certs/gen_certs.sh"
if command -v flock >/dev/null; then flock -n 9
elif ! command -v perl >/dev/null; then fail 'neither flock nor perl is here; install one of them, for the lock'
else perl -e 'use Fcntl ":flock"; open(F, "+<&=", 9) && flock(F, LOCK_EX | LOCK_NB) or exit 1'
fi || fail 'another run is at work on these certificates; try again when it has finished'

# Whoever holds the lock may tidy up after any run, also one that kill -9 has ended. Where a
# move has not come to its end, old/ has the former files: they go back.
tidy_up() {
  local file
  cd "$certs" 2>/dev/null || return 0   # Windows removes no folder that one stands in
  for file in .new.*/old/*; do
    [ ! -e "$file" ] || mv -f "$file" . || fail "cannot put certs/$file back into certs/; move it yourself"
  done
  rm -rf .new.*
}
tidy_up
trap "trap '' HUP INT TERM; tidy_up" EXIT   # a second Ctrl+C must not stop it
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
work=$(mktemp -d "$certs/.new.XXXXXX" 2>/dev/null) || cannot "write in" "$certs"

# What a command says is kept in memory, because the disk may be full, and shown if it fails.
said=
try() { said=$(exec 9>&-; exec "$@" 2>&1); }   # 9, the lock: a child that outlives us must not hold it
run() { try openssl "$@" || give_up; }
give_up() { printf '%s\n' "$said" >&2; fail "failed at $step; $unchanged"; }

step=
begin() { step=$1; printf '%s\n' "$step"; }

# Paths below read certs/NAME because we stand in the temporary folder, which has a certs/ of
# its own: the commands are the ones of the README, to the letter.
mkdir "$work/certs"
cd "$work"
take() {
  [ -r "$certs/$1" ] || cannot read "$certs/$1"
  try cp "$certs/$1" certs/ || fail "cannot copy certs/$1: ${said##*: }"
}
for file in ca.cnf server.cnf client.cnf; do
  [ -f "$certs/$file" ] || fail "certs/$file is missing; restore it, for example with: git checkout certs/$file"
  take "$file"
done
for file in "${files[@]}" ca.crt ca.key; do
  [ ! -d "$certs/$file" ] ||
    fail "certs/$file is a folder (Docker makes one for a mount that is not there); remove it: rmdir certs/$file"
done

# --- The pieces ----------------------------------------------------------------------------

# issue_client NAME: key, CSR and certificate, CN as in client.cnf.
issue_client() {
  run genrsa -out "certs/$1.key" 2048
  run req -new -key "certs/$1.key" -out "certs/$1.csr" -config certs/client.cnf
  run x509 -req -days 365 -in "certs/$1.csr" -CA certs/ca.crt -CAkey certs/ca.key -CAcreateserial \
    -out "certs/$1.crt" -extensions v3_client -extfile certs/client.cnf
}

# export_pfx NAME: certificate, key and CA in one file. The ciphers are chosen, because the
# defaults differ and no default is read everywhere; 3DES with a SHA-1 MAC is. Strength comes
# from the password, which travels in the environment: arguments are visible to every user.
made_up_password=
export_pfx() {
  local pfx=certs/$1.pfx
  set -- -export -out "$pfx" -inkey "certs/$1.key" -in "certs/$1.crt" -certfile certs/ca.crt \
    -name "mTLS Lab $1" -keypbe PBE-SHA1-3DES -certpbe PBE-SHA1-3DES -macalg sha1
  if [ -z "${MTLS_PFX_PASSWORD:-}" ] && [ $can_ask = yes ]; then
    ask_and_export "$pfx" "$@"
  else
    if [ -z "${MTLS_PFX_PASSWORD:-}" ]; then
      run rand -hex -out password 12
      made_up_password=$(tr -d '\r\n' <password)   # \r: a Windows openssl ends lines with it
      MTLS_PFX_PASSWORD=$made_up_password
    fi
    export MTLS_PFX_PASSWORD
    run pkcs12 "$@" -passout env:MTLS_PFX_PASSWORD
  fi
  run asn1parse -inform DER -in "$pfx"   # a full disk can cut it short without a word from pkcs12
}

# ask_and_export PFX ARGUMENT...: openssl asks, twice; a slip need not cost the whole run.
ask_and_export() {
  local pfx=$1 attempt
  shift
  for attempt in 1 2 3; do
    if try openssl pkcs12 "$@"; then
      # An empty password opens it? That would protect nothing, and macOS does not import it.
      try openssl pkcs12 -in "$pfx" -noout -passin pass: || return 0
      complain 'the password must not be empty'
    else
      case $said in *"Can't read Password"*) complain 'the two passwords were not the same' ;; *) give_up ;; esac
    fi
  done
  fail "no password after $attempt attempts; $unchanged"
}

# verify_chain NAME PURPOSE: prints "certs/NAME.crt: OK".
verify_chain() {
  run verify -x509_strict -purpose "$2" -CAfile certs/ca.crt "certs/$1.crt"
  printf '%s\n' "$said"
}

# of_former_ca FILE: true for a certificate of this lab that its CA no longer vouches for.
of_former_ca() {
  try openssl x509 -noout -issuer -in "$1" || return 1
  case $said in *'mTLS Lab Root CA'*) ! try openssl verify -CAfile "$certs/ca.crt" "$1" ;; *) false ;; esac
}

# The only moment at which the real certificates change. From here on a signal waits: half a
# move would leave keys beside the certificates of others. If a file cannot be moved (it is
# open in Windows, or immutable), tidy_up puts the former ones back.
install() {
  chmod 644 certs/*.crt certs/*.csr
  mkdir old
  trap '' HUP INT TERM
  for file in "${files[@]}"; do
    [ ! -e "$certs/$file" ] || try mv -f "$certs/$file" old/ ||
      fail "cannot replace certs/$file: ${said##*: }; $unchanged"
  done
  if ! try mv -f "${files[@]/#/certs/}" "$certs/"; then
    (cd "$certs" && rm -f "${files[@]}")
    fail "cannot write in $certs: ${said##*: }; $unchanged"
  fi
  mv old replaced   # nothing to put back any more
}

valid_until() { openssl x509 -noout -enddate -in "$certs/$1.crt" | tr -d '\r' | sed 's/notAfter=/valid until /'; }

show_password() {
  [ -z "$made_up_password" ] || printf 'Password of certs/%s.pfx (shown only now): %s\n' "$1" "$made_up_password"
}

# --- One more client -----------------------------------------------------------------------

if [ -n "$name" ]; then
  [ -e "$certs/ca.crt" ] || [ -e "$certs/ca.key" ] || fail 'there is no CA yet; make it first: bash certs/gen_certs.sh'
  for file in ca.crt ca.key; do
    [ -e "$certs/$file" ] ||
      fail "certs/$file is missing; bring it back, or begin anew with another CA: bash certs/gen_certs.sh"
    take "$file"
  done
  [ ! -e "$certs/ca.srl" ] || take ca.srl
  there=
  for kind in crt csr key pfx; do
    [ ! -e "$certs/$name.$kind" ] || there="$there certs/$name.$kind"
  done
  if [ -n "$there" ] && ! of_former_ca "$certs/$name.crt"; then
    fail "'$name' exists; choose another NAME, or remove it first: rm$there"
  fi
  # Not with -subj: LibreSSL ignores it where the file says "prompt = no".
  sed "s/^CN *=.*/CN = $name/" "$certs/client.cnf" >certs/client.cnf
  grep -q "^CN = $name\$" certs/client.cnf || fail "certs/client.cnf has no line 'CN = ...' that could take the NAME"

  begin "[1/2] $name: key, CSR and certificate"
  issue_client "$name"
  begin "[2/2] $name: PFX"
  export_pfx "$name"
  verify_chain "$name" sslclient

  install
  printf '\nMade certs/%s.crt, .key, .csr and .pfx, CN %s, %s.\n' "$name" "$name" "$(valid_until "$name")"
  show_password "$name"
  printf 'Next: %s server/server.py --allow-cn mtls-client %s\n' "$python" "$name"
  printf 'then: %s client/client.py --cert certs/%s.crt --key certs/%s.key\n' "$python" "$name" "$name"
  exit 0
fi

# --- The whole set -------------------------------------------------------------------------

begin '[1/6] CA key (4096-bit RSA: a few seconds)'
run genrsa -out certs/ca.key 4096

begin '[2/6] CA certificate'
run req -new -x509 -days 3650 -key certs/ca.key -out certs/ca.crt -config certs/ca.cnf

begin '[3/6] server key and CSR'
run genrsa -out certs/server.key 2048
run req -new -key certs/server.key -out certs/server.csr -config certs/server.cnf

# Signing copies nothing from the CSR: -extensions with -extfile puts SAN and EKU in.
begin '[4/6] server certificate'
run x509 -req -days 365 -in certs/server.csr -CA certs/ca.crt -CAkey certs/ca.key -CAcreateserial \
  -out certs/server.crt -extensions v3_server -extfile certs/server.cnf

begin '[5/6] client key, CSR and certificate'
issue_client client

begin '[6/6] PFX'
export_pfx client

verify_chain server sslserver
verify_chain client sslclient

had_ca=no; [ ! -e "$certs/ca.crt" ] || had_ca=yes
install

printf '\nNow in certs/:\n'
printf '  ca.crt, ca.key          the CA, trust anchor of both sides; %s\n' "$(valid_until ca)"
printf '  server.crt, server.key  for localhost and 127.0.0.1; %s\n' "$(valid_until server)"
printf '  client.crt, client.key  CN mtls-client; %s\n' "$(valid_until client)"
printf '  client.pfx              the same with the CA, for browsers\n'
if [ "$had_ca" = yes ]; then
  printf 'The CA is new: what the former one issued no longer works; restart a running server.\n'
fi
for file in "$certs"/*.crt; do
  other=${file##*/}; other=${other%.crt}
  if of_former_ca "$file"; then
    printf 'certs/%s.crt is of a former CA; reissue it: bash certs/gen_certs.sh client %s\n' "$other" "$other"
  fi
done
show_password client
printf 'Next: %s server/server.py\n' "$python"
