#!/usr/bin/env bash
# run, runsync and stream with nothing but curl.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: curl.sh runsync|run|stream [INPUT]

  runsync   wait for the answer and print the job
  run       submit the job and print its id and status
  stream    submit the job and print every reply of /stream until it ends

INPUT is the job's input as JSON; default: {"prompt": "import os"}

environment:
RUNPOD_API_KEY       your key (required)
RUNPOD_ENDPOINT_ID   the endpoint's id (required)
RUNPOD_BASE_URL      default: https://api.runpod.ai/v2; the emulator: http://127.0.0.1:8008/v2
HELP
}

fail() { # CODE SENTENCE
  printf '%s\n' "$2" >&2
  exit "$1"
}

call() { # METHOD PATH [BODY]: sets $reply
  # curl reads the key from a pipe: as an argument, the list of processes would show it.
  reply=$(curl -sS -X "$1" "$url/$2" ${3+-d "$3"} -w '\n%{http_code}' \
    -H 'Content-Type: application/json' \
    -H @<(printf 'Authorization: Bearer %s\n' "$RUNPOD_API_KEY")) ||
    fail 1 "The endpoint cannot be reached."
  local code=${reply##*$'\n'}
  reply=${reply%$'\n'*}
  case $code in
    2??) ;;
    401 | 403) fail 1 "The endpoint does not accept this RUNPOD_API_KEY (HTTP $code): $reply" ;;
    404) fail 1 "There is no such endpoint; look at RUNPOD_ENDPOINT_ID (HTTP 404): $reply" ;;
    429) fail 1 "The endpoint has too many requests; try again later (HTTP 429): $reply" ;;
    5??) fail 1 "The endpoint is in trouble; try again later (HTTP $code): $reply" ;;
    *) fail 1 "The endpoint refused the request (HTTP $code): $reply" ;;
  esac
}

field() { # NAME: sets $value to the reply's first text of that name
  [[ $reply =~ \"$1\":\ *\"([^\"]*)\" ]] || fail 1 "The answer is not Runpod's: $reply"
  value=${BASH_REMATCH[1]}
}

case ${1-} in
  run | runsync | stream) ;;
  -h | --help) usage && exit ;;
  *) usage >&2 && exit 2 ;;
esac
[[ ${RUNPOD_API_KEY-} && ${RUNPOD_ENDPOINT_ID-} ]] ||
  fail 2 "Set RUNPOD_API_KEY and RUNPOD_ENDPOINT_ID in the environment; see --help."
[[ $RUNPOD_API_KEY =~ ^[[:graph:]]+$ ]] ||
  fail 2 "RUNPOD_API_KEY holds a space, a line break or another character no key has."
url=${RUNPOD_BASE_URL:-https://api.runpod.ai/v2}/$RUNPOD_ENDPOINT_ID
input=${2-'{"prompt": "import os"}'}

call POST "${1/stream/run}" "{\"input\": $input}"
case $1 in
  run) printf '%s\n' "$reply" && exit ;;
  runsync)
    printf '%s\n' "$reply"
    field status
    ;;
  stream)
    field id
    job=$value value=IN_QUEUE
    # COMPLETED is not the only end.
    until [[ $value != IN_* && $reply =~ \"stream\":\ *\[\] ]]; do
      call GET "stream/$job"
      printf '%s\n' "$reply"
      field status
    done
    ;;
esac
[[ $value == COMPLETED ]] || fail 1 "The job is $value."
