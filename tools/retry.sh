#!/usr/bin/env bash
# Runs a command that needs the network, up to three times.
#
#   tools/retry.sh COMMAND [ARGUMENT ...]
for pause in 5 20 0; do
  "$@" && exit 0
  status=$?
  [ "$pause" = 0 ] || echo "retry: '$1' failed with $status, trying again in $pause s" >&2
  sleep "$pause"
done
exit "$status"
