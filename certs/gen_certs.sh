#!/usr/bin/env bash
# Makes the lab's certificates with the openssl command: a CA, a server and a client
# certificate, and a PFX of the client's. Works from any folder; all files land beside
# this script. It builds and verifies everything in a temporary folder first and only then
# moves it into place, so a run that fails or is interrupted changes nothing.
#
# Needs OpenSSL 1.1.1+ or LibreSSL 3.3+, and bash 3.2+ (what macOS has).
set -euo pipefail
umask 077   # private from the moment they exist: some openssls create keys readable by all
LC_ALL=C    # so that A-Z means these letters and no others, in every language and bash

usage() {
  cat <<'TEXT'
usage: bash certs/gen_certs.sh               make the CA, the server's and the client's certificate
       bash certs/gen_certs.sh client NAME   issue one more client certificate, CN = NAME

Without arguments it replaces the whole set, CA included. Password of the PFX: asked for on
a terminal, taken from MTLS_PFX_PASSWORD if that is set, else made up and printed at the end.
TEXT
}

fail() {
  printf 'gen_certs.sh: %s\n' "$*" >&2
  exit 1
}

# --- What is asked for ---------------------------------------------------------------------

name=          # empty: the whole set
case "$#:${1:-}:${2:-}" in
  0::) ;;
  1:-h: | 1:--help: | 2:client:-h | 2:client:--help) usage; exit 0 ;;
  1:client: | 2:client:) echo 'gen_certs.sh: client needs a NAME, as in: bash certs/gen_certs.sh client alice' >&2; exit 2 ;;
  2:client:*) name=$2 ;;
  *) usage >&2; printf 'gen_certs.sh: cannot use these arguments: %s\n' "$*" >&2; exit 2 ;;
esac

certs=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)

command -v openssl >/dev/null || fail 'the openssl command is missing; install OpenSSL 1.1.1+ or LibreSSL 3.3+'
version=$(openssl version) || fail 'the openssl command does not run; install OpenSSL 1.1.1+ or LibreSSL 3.3+'
case $version in
  'OpenSSL 0.'* | 'OpenSSL 1.0.'* | 'OpenSSL 1.1.0'* | 'LibreSSL '[0-2].* | 'LibreSSL 3.'[0-2].*)
    fail "$version is too old; install OpenSSL 1.1.1+ or LibreSSL 3.3+" ;;
esac

# --- One run at a time, nothing left behind ------------------------------------------------

# The kernel keeps this lock for as long as this process lives: a killed run cannot leave it
# behind, and two runs can never both hold it. macOS and Git Bash have no flock, but perl.
{ exec 9<>"$certs/gen_certs.sh"; } 2>/dev/null || fail "cannot write in $certs"
if command -v flock >/dev/null; then flock -n 9
elif ! command -v perl >/dev/null; then fail 'neither flock nor perl is here; install one of them, for the lock'
else perl -e 'use Fcntl ":flock"; open(F, "+<&=", 9) && flock(F, LOCK_EX | LOCK_NB) or exit 1'
fi || fail 'another run is at work on these certificates; try again when it has finished'

# Whoever holds the lock may remove every .new.*: this run's, and what a kill -9 has left.
cleanup() {
  trap '' HUP INT TERM           # a second Ctrl+C must not stop this
  cd "$certs" 2>/dev/null || :   # Windows removes no folder that one stands in
  rm -rf "$certs"/.new.*
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
work=$(mktemp -d "$certs/.new.XXXXXX") || fail "cannot write in $certs"

step=
begin() { step=$1; printf '%s\n' "$step"; }

# Every openssl that makes something goes through here. Its chatter is shown only when it fails, and then all of
# it; in memory, because the disk may be full. It must not inherit the lock (9): a child that
# outlives us would hold on to it.
log=
run() {
  if ! log=$(exec 9>&-; exec openssl "$@" 2>&1); then
    printf '%s\n' "$log" >&2
    fail "failed at $step; the certificates that were there are unchanged"
  fi
}

# Paths below read certs/NAME because we stand in the temporary folder, which has a certs/ of
# its own: the commands are the ones of the README, to the letter.
mkdir "$work/certs"
cd "$work"
for file in ca server client; do
  [ -f "$certs/$file.cnf" ] || fail "certs/$file.cnf is missing; restore it, for example with: git checkout certs"
  cp "$certs/$file.cnf" certs/
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
  local pfx=$1.pfx
  set -- -export -out "certs/$pfx" -inkey "certs/$1.key" -in "certs/$1.crt" -certfile certs/ca.crt \
    -name "mTLS Lab: $1" -keypbe PBE-SHA1-3DES -certpbe PBE-SHA1-3DES -macalg sha1
  if [ -z "${MTLS_PFX_PASSWORD:-}" ] && [ -t 0 ]; then
    openssl pkcs12 "$@" 9>&- || fail "failed at $step; the certificates that were there are unchanged"
  else
    if [ -z "${MTLS_PFX_PASSWORD:-}" ]; then
      run rand -hex -out "$work/password" 12
      made_up_password=$(cat "$work/password")
      MTLS_PFX_PASSWORD=$made_up_password
    fi
    export MTLS_PFX_PASSWORD
    run pkcs12 "$@" -passout env:MTLS_PFX_PASSWORD
  fi
  run asn1parse -inform DER -in "certs/$pfx"   # a full disk can cut it short without a word from pkcs12
}

# verify_chain NAME PURPOSE: prints "certs/NAME.crt: OK".
verify_chain() {
  run verify -x509_strict -purpose "$2" -CAfile certs/ca.crt "certs/$1.crt"
  printf '%s\n' "$log"
}

# of_former_ca FILE: true for a certificate of this lab that its CA no longer vouches for.
of_former_ca() {
  case $(openssl x509 -noout -issuer -in "$1" 2>/dev/null) in
    *'mTLS Lab Root CA'*) ! openssl verify -CAfile "$certs/ca.crt" "$1" >/dev/null 2>&1 ;;
    *) false ;;
  esac
}

# install FILE...: the only moment at which the real certificates change. From here on a
# signal waits: half a move would leave keys beside the certificates of others.
install() {
  for file; do
    [ ! -d "$certs/${file##*/}" ] ||
      fail "certs/${file##*/} is a folder (Docker makes one for a mount that is not there); remove it: rmdir certs/${file##*/}"
  done
  chmod 644 certs/*.crt certs/*.csr
  trap '' HUP INT TERM
  mv -f "$@" "$certs/"
}

valid_until() {
  openssl x509 -noout -enddate -in "$certs/$1.crt" | sed 's/notAfter=/valid until /'
}

show_password() {
  [ -z "$made_up_password" ] || printf 'Password of certs/%s.pfx (shown only now): %s\n' "$1" "$made_up_password"
}

# --- One more client -----------------------------------------------------------------------

if [ -n "$name" ]; then
  case $name in
    [.-]* | *[!A-Za-z0-9._-]*) fail "'$name' is not a valid NAME: letters, digits, '.', '_' and '-', beginning with a letter, digit or '_'" ;;
    [Cc][Aa] | [Ss][Ee][Rr][Vv][Ee][Rr]) fail "'$name' would overwrite the lab's own files; choose another NAME" ;;
    [Cc][Ll][Ii][Ee][Nn][Tt]) fail "'client' is made with the whole set: bash certs/gen_certs.sh" ;;
  esac
  [ "${#name}" -le 64 ] || fail 'a NAME has at most 64 characters (the limit of a common name)'
  if [ ! -f "$certs/ca.crt" ] || [ ! -f "$certs/ca.key" ]; then
    fail 'there is no CA yet; make it first: bash certs/gen_certs.sh'
  fi
  for file in "$certs/$name.crt" "$certs/$name.key" "$certs/$name.csr" "$certs/$name.pfx"; do
    if [ -e "$file" ] && ! of_former_ca "$certs/$name.crt"; then
      fail "certs/${file##*/} exists; choose another NAME, or remove it first: rm certs/$name.{crt,csr,key,pfx}"
    fi
  done
  cp "$certs"/ca.* certs/
  # Not with -subj: LibreSSL ignores it where the file says "prompt = no".
  sed "s/^CN *=.*/CN = $name/" "$certs/client.cnf" >certs/client.cnf
  grep -q "^CN = $name\$" certs/client.cnf || fail "certs/client.cnf has no line 'CN = ...' that could take the NAME"

  begin "[1/2] $name: key, CSR and certificate"
  issue_client "$name"
  begin "[2/2] $name: PFX"
  export_pfx "$name"
  verify_chain "$name" sslclient

  # The serial first: one that is counted but not used is harmless, one used twice is not.
  install certs/ca.srl "certs/$name.key" "certs/$name.csr" "certs/$name.crt" "certs/$name.pfx"
  printf '\nMade certs/%s.crt, .key, .csr and .pfx, CN %s, %s.\n' "$name" "$name" "$(valid_until "$name")"
  show_password "$name"
  printf 'Next: python3 client/client.py --cert certs/%s.crt --key certs/%s.key\n' "$name" "$name"
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
rm certs/*.cnf
install certs/*

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
printf 'Next: python3 server/server.py\n'
