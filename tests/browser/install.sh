#!/bin/sh
# Finds a browser for the tests of this folder, or installs Debian's Chromium where it may. Never fails: without
# a browser those tests are skipped.

for name in chromium chromium-browser google-chrome; do
  command -v "$name" >/dev/null && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Installing chromium for tests/browser"
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } \
    >/dev/null && exit 0
fi
echo "There is no browser, so tests/browser is skipped. To run it, install chromium" >&2
