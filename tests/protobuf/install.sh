#!/bin/sh
# Installs Debian's protoc, its plugins for Go, protobuf's Java library, and Go with gRPC for tests/protobuf and
# tests/docs, if one is missing and this user is root. Never fails: tests that need what is missing are skipped.

if command -v protoc >/dev/null && command -v protoc-gen-go >/dev/null && command -v protoc-gen-go-grpc >/dev/null \
    && [ -e /usr/share/java/protobuf.jar ] && command -v go >/dev/null \
    && [ -e /usr/share/gocode/src/google.golang.org/grpc ] \
    && [ -e /usr/share/gocode/src/google.golang.org/protobuf/types/known ]; then
  exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Installing protoc, its plugins for Go, protobuf.jar, and Go with gRPC"
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    protobuf-compiler protoc-gen-go protoc-gen-go-grpc libprotobuf-java \
    golang-go golang-google-grpc-dev golang-google-protobuf-dev; } >/dev/null && exit 0
fi
echo "protoc, its plugins for Go, protobuf.jar, or Go with gRPC are missing: tests that need them are skipped" >&2
