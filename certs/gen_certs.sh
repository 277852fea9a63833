#!/usr/bin/env bash
# Makes the lab's certificates with the openssl command: a CA, a server's and a client's
# certificate, and a PFX for the client. Run it from any folder; it puts all files beside
# itself. It first makes and verifies everything in a temporary folder and only then moves it into
# place, so a run that fails or is interrupted changes nothing.
#
# Needs OpenSSL 1.1.1+ or LibreSSL 3.3+, and bash 3.2+ (the one on macOS).
case ${BASH_VERSION:-} in '') echo "gen_certs.sh: needs bash; run it with: bash $0${*:+ $*}" >&2; exit 1 ;; esac
# Restart with -p, so that nothing inherited (SHELLOPTS, BASH_ENV, exported functions) changes
# what the commands below mean. To watch them: bash -xp certs/gen_certs.sh
# (POSIXLY_CORRECT makes exec and unset immune to inherited functions, too.)
case $- in *p*) ;; *) POSIXLY_CORRECT=1; unset CDPATH; exec "$BASH" -p "$0" "$@" ;; esac
unset POSIXLY_CORRECT
set -euo pipefail +o posix   # posix mode is on where sh is bash, as on macOS
umask 077   # keys are private from the moment they exist; LibreSSL makes them readable by all
LC_ALL=C    # A-Z means these 26 letters only, in every locale and bash

# Messages call this folder what the user calls it, so their commands work as they are printed.
folder=$(dirname -- "$0") certs=$(cd -- "$folder" && pwd -P)
[ "$folder" != . ] || folder=../${certs##*/}
printf -v here %q "$folder"
self="bash $here/gen_certs.sh"

usage() {
  cat <<'TEXT'
usage: bash certs/gen_certs.sh                certificates of CA, server, client
       bash certs/gen_certs.sh client NAME    one for another client, CN = NAME
       bash certs/gen_certs.sh renew [NAME]   renew server and client, or NAME
       bash certs/gen_certs.sh --help         show this help

Without arguments it replaces the whole set, CA included. renew keeps the CA
and the keys, and makes what is missing; NAME is server, client or another
client. The new server.crt has the names under alt_names in server.cnf.
A forgotten PFX password? renew makes a new PFX. The password is asked for on a
terminal, taken from MTLS_PFX_PASSWORD if that is set, or made up and printed.
TEXT
}

unchanged='certs/ is unchanged'
complain() { printf 'gen_certs.sh: %s\n' "$*" >&2; }
refuse() { complain "$@"; exit 2; }
fail() { complain "$@"; exit 1; }

# --- What to make --------------------------------------------------------------------------

# Whose certificates to make; '' means none. The files are NAME.key, NAME.csr and so on.
command=${1:-set} name=${2:-} server=server client=client
case $#:${1:-} in
  0: | 1:renew) ;;
  1:-h | 1:--help) usage; exit 0 ;;
  1:client) refuse "the NAME of the client is missing; for example: $self client alice" ;;
  2:client | 2:renew)
    case $name in *.crt | *.csr | *.key | *.pfx) name=${name%.*} ;; esac   # as Tab completes it
    case $command:$name in
      *: | *:[.-]* | *:*[!A-Za-z0-9._-]*)
        refuse "'$name' is not a valid NAME: letters, digits, '.', '_' and '-', not starting with '.' or '-'" ;;
      renew:server) client= ;;
      renew:client) server= ;;
      *:[Cc][Aa] | *:[Ss][Ee][Rr][Vv][Ee][Rr] | *:[Cc][Ll][Ii][Ee][Nn][Tt])   # a file system may ignore case
        refuse "'$name' belongs to the whole set; choose another NAME" ;;
      *) server='' client=$name ;;
    esac
    [ "${#name}" -le 64 ] || refuse 'a NAME has at most 64 characters (the limit of a common name)' ;;
  *) refuse "cannot use these arguments: $*; see: $self --help" ;;
esac
leaves=(${server:+server} ${client:+"$client"})
steps=$((${#leaves[@]} + (${#client} > 0)))
[ "$command" != set ] || steps=6

# In Git Bash, python3 is an alias of the Microsoft Store, and openssl cannot prompt on its terminal.
python=python3 can_ask=no
case $OSTYPE in
  msys* | cygwin*) python=python ;;
  *) if [ -t 0 ] && { : </dev/tty; } 2>/dev/null; then can_ask=yes; fi ;;
esac

# cannot read|write NAME [USE]: say why, and fail. Only the owner is told to use chmod, and only with
# u, which gives nobody else access to a key.
error=
cannot() {
  local mode who step="chmod u+${1:0:1} $here/$2"
  case $error in '' | *[Pp]ermission*) ;; *) fail "cannot $1 $here/$2${3:-}: ${error##*: }; $unchanged" ;; esac
  read -r mode _ who _ < <(ls -ld "$certs/$2")
  [ -O "$certs/$2" ] || step="sudo chown -R \"\$(id -un)\" $here"
  fail "cannot $1 $here/$2${3:-}: it belongs to $who, mode $mode; $step"
}

version=$(openssl version 2>&1) || fail "openssl: ${version##*: }; install OpenSSL 1.1.1+ or LibreSSL 3.3+"
case $version in
  'OpenSSL 0.'* | 'OpenSSL 1.0.'* | 'OpenSSL 1.1.0'* | 'LibreSSL '[0-2].* | 'LibreSSL 3.'[0-2].*)
    fail "$version is too old; install OpenSSL 1.1.1+ or LibreSSL 3.3+" ;;
esac

# --- One run at a time, nothing left behind ------------------------------------------------

# The kernel holds this lock for as long as this process lives: a killed run cannot leave it
# behind, and two runs can never both have it. macOS and Git Bash have perl instead of flock.
error=$({ : 9<>"$certs/gen_certs.sh"; } 2>&1) || cannot write gen_certs.sh ' (for the lock)'
exec 9<>"$certs/gen_certs.sh"
if command -v flock >/dev/null; then flock -n 9
elif ! command -v perl >/dev/null; then fail 'neither flock nor perl is installed; install one of them, for the lock'
else perl -e 'use Fcntl ":flock"; open(F, "+<&=", 9) && flock(F, LOCK_EX | LOCK_NB) or exit 1'
fi || fail 'another run is at work on these certificates; try again when it has finished'

# Whoever holds the lock may clean up after any run, even one ended by kill -9. If that one
# did not finish moving its files, the former ones are still in old/: put them back.
tidy_up() {
  local file
  cd "$certs" 2>/dev/null || return 0   # Windows cannot remove the current folder
  for file in .new.*/old/*; do
    [ ! -e "$file" ] || mv -f "$file" . || fail "cannot put $here/$file back into $here/; move it yourself"
  done
  rm -rf .new.*
}
tidy_up
trap "trap '' HUP INT TERM; tidy_up" EXIT   # a second Ctrl+C must not stop it
stop() { trap '' HUP INT TERM; complain "interrupted; $unchanged" || :; exit "$1"; }
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM
work=$(LC_ALL=C mktemp -d "$certs/.new.XXXXXX" 2>&1) || { error=$work; cannot write ""; }

# What a command prints is kept in memory, because the disk may be full, and shown if it fails.
said=
try() { said=$(exec 9>&-; exec "$@" 2>&1); }   # 9, the lock: no child may hold it longer than we do
run() { try openssl "$@" || give_up "${!#}"; }
about() { openssl "$@" 2>/dev/null 9>&- | tr -d '\r'; }   # \r: a Windows openssl ends lines with it
common_name() { about x509 -noout -subject -nameopt multiline -in "$1" | sed -n 's/^ *commonName *= //p'; }

# give_up LAST: LAST is the last argument of the command that failed: the .cnf if it reads one.
give_up() {
  printf '%s\n' "$said" >&2
  case $1:$said in *.cnf:*[Cc]onfig* | *.cnf:*extension*) unchanged+="; correct $1, as openssl says above" ;; esac
  fail "failed at $step; $unchanged"
}

step='' number=0
begin() {
  step="[$((number += 1))/$steps] $1"
  printf '%s\n' "$step" 2>/dev/null || fail "cannot write to standard output; $unchanged"
}

# From here on the current folder is the temporary one. It has a certs/ of its own, so the
# commands below are exactly those on the page.
mkdir "$work/certs"
cd "$work"
made=(ca.srl)   # the files in it to be moved into place
is_there() { [ -e "$certs/$1" ]; }
take() {
  [ -r "$certs/$1" ] || cannot read "$1"
  try cp "$certs/$1" certs/ || fail "cannot copy $here/$1: ${said##*: }; $unchanged"
}

# --- What is there already -----------------------------------------------------------------

for file in "$certs"/*.{key,crt,csr,pfx,srl}; do
  name=${file##*/}
  [ ! -d "$file" ] || fail "$here/$name is a folder (Docker makes them for missing files); remove it: rmdir $here/$name"
done
for file in ca.cnf server.cnf client.cnf; do
  [ -f "$certs/$file" ] || fail "$here/$file is missing; restore it, for example with: git -C $here checkout $file"
  take "$file"
done

# openssl takes DNS.2 = 127.0.0.2, but no client does: such names are refused here.
[ -z "$server" ] || while read -r key value; do
  line=${value#*://} line=${line%%/*}
  case $line in *:*:*) ;; *) line=${line%:*} ;; esac   # a port
  case $line:${line//[0-9]/} in
    :) line="$key = lab.test" ;;
    *:... | *:*:*) line="IP.$(($(grep -c '^[[:space:]]*IP' certs/server.cnf || :) + 1)) = $line" ;;
    *) line="$key = $line" ;;
  esac
  [ "$line" = "$key = $value" ] || fail "$here/server.cnf: $key = '$value' is not a host name; write instead: $line"
done < <(sed -n 's/^[[:space:]]*\(DNS[.0-9]*\)[[:space:]]*=[[:space:]]*\([^#[:space:]]*\).*/\1 \2/p' certs/server.cnf)

# take_key FILE STEP: STEP is what to do if it is not a key.
take_key() {
  local key=$here/$1 problem form
  take "$1"
  if grep -q ENCRYPTED "certs/$1"; then form='' problem='has a password; remove it'
  elif grep -q 'PRIVATE KEY-----' "certs/$1" && try openssl pkey -noout -in "certs/$1"; then return
  elif about pkey -inform DER -noout -in "certs/$1"; then form=' -inform DER' problem='is in DER form; convert it'
  else fail "$key holds no private key in PEM form; $2"; fi
  fail "$key $problem: (umask 077; openssl pkey$form -in $key -out $here/new.pem) && mv $here/new.pem $key"
}

# If the CA's certificate is lost, its key can make it again, and everything that it issued stays
# valid. If the key is lost, a new CA is the only way.
if [ "$command" != set ]; then
  lost="if you cannot, make a new CA and all certificates: $self"
  again="make it again from its key: openssl req -new -x509 -days 3650 -key $here/ca.key"
  again="$again -out $here/ca.crt -config $here/ca.cnf"
  is_there ca.crt || is_there ca.key || fail "there is no CA yet; make it first: $self"
  is_there ca.key || fail "$here/ca.key is missing; restore it; $lost"
  take_key ca.key "restore it; $lost"
  is_there ca.crt || fail "$here/ca.crt is missing; $again"
  take ca.crt
  public=$(grep -q 'BEGIN.* CERTIFICATE-----' certs/ca.crt && about x509 -noout -pubkey -in certs/ca.crt) ||
    fail "$here/ca.crt holds no certificate in PEM form; $again"
  if [ "$public" != "$(about pkey -pubout -in certs/ca.key)" ]; then
    [ "$(grep -c BEGIN certs/ca.crt)" = 1 ] ||   # of two CAs in it, openssl signs with the first
      fail "the first certificate in $here/ca.crt does not match $here/ca.key; move the one that does to the top"
    case $(about x509 -noout -text -in certs/ca.crt) in
      *CA:TRUE*) fail "$here/ca.key does not match $here/ca.crt; restore the one that is wrong; $lost" ;;
      *) fail "$here/ca.crt is not a CA certificate; $again" ;;
    esac
  fi
  try openssl x509 -noout -checkend 0 -in certs/ca.crt || fail "$here/ca.crt has expired; $again"
  ! is_there ca.srl || take ca.srl
  grep -qs '^[0-9A-F]' certs/ca.srl || rm -f certs/ca.srl   # openssl makes one if there is none
fi

# of_lab FILE: whether its issuer has our CA's name, whether that is the present CA or a former one.
of_lab() {
  [ "$(about x509 -noout -issuer_hash -in "$1")" = "$(about x509 -noout -subject_hash -in "$certs/ca.crt")" ]
}
of_ca() { try openssl verify -CAfile "$certs/ca.crt" "$1"; }
of_former_ca() { ! of_ca "$1" && of_lab "$1"; }

case $client in '' | client) ;; *)
  there=$(cd "$certs" && ls "$client".{key,csr,crt,pfx} 2>/dev/null) || :   # those that exist
  case $command:$there in
    renew:)
      shopt -s nocasematch
      for file in "$certs"/*.crt; do
        other=${file##*/} other=${other%.crt} cn=$(common_name "$file")
        case $client in "$other" | "$cn")
          fail "there is no $client.crt, but $other.crt (CN $cn); renew that: $self renew $other" ;; esac
      done
      fail "'$client' has no certificate; make one: $self client $client" ;;
    client:?*) of_former_ca "$certs/$client.crt" ||
      fail "'$client' exists; choose another NAME, or renew it: $self renew $client" ;;
  esac
  # Not with -subj: LibreSSL ignores it where the file says "prompt = no".
  sed "s/^CN *=.*/CN = $client/" "$certs/client.cnf" >certs/client.cnf
  grep -q "^CN = $client\$" certs/client.cnf || fail "$here/client.cnf has no line 'CN = ...' that could take the NAME"
esac

[ "$command" != renew ] || for leaf in "${leaves[@]}"; do
  of_ca "$certs/$leaf.crt" || of_lab "$certs/$leaf.crt" || ! about x509 -noout -in "$certs/$leaf.crt" ||
    fail "$here/$leaf.crt is not from this lab's CA; to replace it, first move it:" \
      "mv $here/$leaf.crt $here/$leaf.old.crt"
  ! is_there "$leaf.key" || take_key "$leaf.key" "for a new one, move it: mv $here/$leaf.key $here/$leaf.old.key"
done

# --- The CA --------------------------------------------------------------------------------

if [ "$command" = set ]; then
  begin 'CA key (4096-bit RSA: a few seconds)'
  run genrsa -out certs/ca.key 4096
  begin 'CA certificate'
  run req -new -x509 -days 3650 -key certs/ca.key -out certs/ca.crt -config certs/ca.cnf
  made+=(ca.key ca.crt)
fi

# --- The certificates of server and client -------------------------------------------------

kind_of() { if [ "$1" = server ]; then echo server; else echo client; fi; }

for leaf in "${leaves[@]}"; do
  kind=$(kind_of "$leaf")
  case $command:$leaf in
    set:server) begin 'server key and CSR' ;;
    renew:*) begin "$leaf certificate" ;;
    *) begin "$leaf key, CSR and certificate" ;;
  esac
  if [ ! -e "certs/$leaf.key" ]; then   # renew has taken the one that is there
    run genrsa -out "certs/$leaf.key" 2048
    made+=("$leaf.key")
  fi
  run req -new -key "certs/$leaf.key" -out "certs/$leaf.csr" -config "certs/$kind.cnf"
  [ "$command:$leaf" != set:server ] || begin 'server certificate'
  # Signing copies nothing from the CSR: -extensions with -extfile puts SAN and EKU in.
  run x509 -req -days 365 -in "certs/$leaf.csr" -CA certs/ca.crt -CAkey certs/ca.key -CAcreateserial \
    -out "certs/$leaf.crt" -extensions "v3_$kind" -extfile "certs/$kind.cnf"
  made+=("$leaf.csr" "$leaf.crt")
done

# --- The PFX: the client's certificate, its key and the CA's certificate in one file -------

# The ciphers are set, because the defaults differ and none of them can be imported everywhere;
# 3DES with a SHA-1 MAC can. Its only strength is the password, which is passed in the
# environment: arguments are visible to every user.
made_up_password=
if [ -n "$client" ]; then
  begin PFX
  if [ -z "${MTLS_PFX_PASSWORD:-}" ] && [ $can_ask = no ]; then
    run rand -hex -out password 12
    made_up_password=$(tr -d '\r\n' <password)
    export MTLS_PFX_PASSWORD=$made_up_password
  fi
  for attempt in 1 2 3; do   # without -passout openssl asks, twice
    if try openssl pkcs12 -export -out "certs/$client.pfx" -inkey "certs/$client.key" -in "certs/$client.crt" \
      -certfile certs/ca.crt -name "mTLS Lab $client" -keypbe PBE-SHA1-3DES -certpbe PBE-SHA1-3DES -macalg sha1 \
      ${MTLS_PFX_PASSWORD:+-passout env:MTLS_PFX_PASSWORD}
    then
      # If an empty password opens it, it protects nothing, and macOS does not import it.
      if [ -n "${MTLS_PFX_PASSWORD:-}" ] || ! try openssl pkcs12 -in "certs/$client.pfx" -noout -passin pass:
      then break; fi
      complain 'the password must not be empty'
    else
      case $said in *"Can't read Password"*) complain 'no password, or the two differ' ;; *) give_up '' ;; esac
    fi
    [ "$attempt" -lt 3 ] || fail "no password after $attempt attempts; $unchanged"
  done
  run asn1parse -inform DER -in "certs/$client.pfx"   # if the disk is full, pkcs12 can truncate it silently
  made+=("$client.pfx")
fi

# --- Verify, and move into place -----------------------------------------------------------

for leaf in "${leaves[@]}"; do
  run verify -x509_strict -purpose "ssl$(kind_of "$leaf")" -CAfile certs/ca.crt "certs/$leaf.crt"
  printf '%s\n' "$said"   # certs/NAME.crt: OK
done

# The only moment at which the real certificates change. From here on signals are ignored: half
# a move would leave keys beside certificates that do not match. If a file cannot be moved (it
# is open in Windows, or immutable), tidy_up puts the former ones back.
chmod 644 certs/*.crt certs/*.csr
mkdir old
trap '' HUP INT TERM
for file in "${made[@]}"; do
  ! is_there "$file" || try mv -f "$certs/$file" old/ || fail "cannot replace $here/$file: ${said##*: }; $unchanged"
done
if ! try mv -f "${made[@]/#/certs/}" "$certs/"; then
  (cd "$certs" && rm -f "${made[@]}")
  fail "cannot write to $here/: ${said##*: }; $unchanged"
fi
mv old replaced   # nothing to put back any more
set +e            # the work is done, even if a report fails

# --- What there is now ---------------------------------------------------------------------

# row NAME: its certificate (and key, if new), what it is for, and until when.
row() {
  local files=$1.crt crt=$certs/$1.crt what
  case " ${made[*]} " in *" $1.key "*) files="$files, $1.key" ;; esac
  case $1 in
    ca) what='the CA, trust anchor of both sides' ;;
    server)   # LibreSSL has no -ext
      what=$(about x509 -noout -text -in "$crt" |
        sed -n '/Alternative Name/{n;s/^ */for /;s/DNS://g;s/IP Address://g;p;}') ;;
    *) what="CN $(common_name "$crt")" ;;
  esac
  printf '  %-23s %s; ' "$files" "$what"
  about x509 -noout -enddate -in "$crt" | sed 's/notAfter=/valid until /' || echo
}

case $command in set) what=Now ;; client) what=Made ;; *) what=Renewed ;; esac
printf '\n%s in certs/:\n' "$what"
[ "$command" != set ] || row ca
for leaf in "${leaves[@]}"; do row "$leaf"; done
[ -z "$client" ] || printf '  %-23s the same with the CA, for browsers\n' "$client.pfx"
if [ -e replaced/ca.crt ]; then
  printf 'The CA is new: certificates from the former one no longer work.\n'
  for file in "$certs"/*.crt; do
    name=${file##*/} name=${name%.crt}
    ! of_former_ca "$file" || echo "$here/$name.crt is from the former CA; renew it: $self renew $name"
  done
fi
next=Next
[ ! -e replaced/server.crt ] || next='Next, unless it runs already'
[ "$next" = Next ] || echo 'A running server loads them by itself.'
[ -z "$made_up_password" ] || printf 'Password of %s (shown only now): %s\n' "$here/$client.pfx" "$made_up_password"

printf -v serve '%s %q' "$python" "${folder%certs}server/server.py"
case $command in
  set) printf '%s: %s\n' "$next" "$serve" ;;
  client)   # all clients of this CA, client.crt's first: the list lets in nobody else
    names=
    for file in "$certs"/client.crt "$certs"/*.crt; do
      [ "$file" != "$certs/ca.crt" ] || continue   # LibreSSL takes it for a client's
      try openssl verify -purpose sslclient -CAfile "$certs/ca.crt" "$file" || continue
      name=$(printf %q "$(common_name "$file")")
      case "$names " in *" $name "*) ;; *) names="$names $name" ;; esac
    done
    printf 'Next: %s --allow-cn%s\n' "$serve" "$names"
    printf 'then: %s %q --cert %s.crt --key %s.key\n' \
      "$python" "${folder%certs}client/client.py" "$here/$client" "$here/$client" ;;
esac
