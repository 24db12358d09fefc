#!/bin/sh
# Installs Debian's protoc, its plugins for Go and protobuf's Java library for tests/protobuf, if one is missing and this
# user is root. Never fails: tests that need what is missing are skipped.

if command -v protoc >/dev/null && command -v protoc-gen-go >/dev/null && command -v protoc-gen-go-grpc >/dev/null \
    && [ -e /usr/share/java/protobuf.jar ]; then
  exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Installing protoc, protoc-gen-go, protoc-gen-go-grpc and protobuf.jar for tests/protobuf"
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    protobuf-compiler protoc-gen-go protoc-gen-go-grpc libprotobuf-java; } >/dev/null && exit 0
fi
echo "protoc, its plugins for Go or protobuf.jar are missing: tests that need them are skipped" >&2
