#!/bin/sh
# Installs Debian's nginx for the tests of deploy/nginx if it is missing and this user is root; it is not started. Never
# fails: without nginx, the tests are skipped.

command -v nginx >/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Installing nginx-light for tests of deploy/nginx"
  { apt-get update && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends nginx-light; } \
    >/dev/null && exit 0
fi
echo "nginx is not installed: its tests are skipped. Install nginx to run them" >&2
